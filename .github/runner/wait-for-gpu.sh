#!/usr/bin/env bash
# Waits until one GPU has GIB of free memory, for at most SECONDS.   wait-for-gpu.sh GIB SECONDS
set -euo pipefail

if [ $# -ne 2 ]; then
    echo "usage: wait-for-gpu.sh GIB SECONDS" >&2
    exit 2
fi
wanted_mib=$(($1 * 1024))
deadline=$((SECONDS + $2))
while true; do
    free_mib=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits | sort -n | tail -n 1)
    if [ "$free_mib" -ge "$wanted_mib" ]; then
        echo "a GPU has $free_mib MiB free"
        exit 0
    fi
    if [ "$SECONDS" -ge "$deadline" ]; then
        echo "no GPU had $1 GiB free within $2 s (the best has $free_mib MiB); who holds it:" >&2
        nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv >&2
        exit 1
    fi
    sleep 10
done
