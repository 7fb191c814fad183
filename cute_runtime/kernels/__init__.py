"""What is built and loaded like a kernel and runs on the host: launches.c, whose calls are made in cute_runtime/launches.py."""
