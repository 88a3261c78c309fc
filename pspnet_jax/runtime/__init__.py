"""Shared by all other folders: errors, files, checkpoints, hosts, devices, logs."""

VERSION = '0.1.0'
