"""What every part stands on: errors, files and checkpoints, hosts and devices, logs."""

VERSION = '0.1.0'
