"""Serves long jobs: progress, parallel work, devices, disks and names."""
