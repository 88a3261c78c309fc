"""What all other folders use: errors, files, checkpoints, hosts, devices, logs."""

VERSION = '0.1.0'
