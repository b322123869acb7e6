#!/bin/bash
# sbatch slurm.sh: Ray on every node of the allocation, one run, and everything ends with the job.
# Submit it again to go on where the time limit cut it off: the run resumes from its last checkpoint.
#SBATCH --job-name=eggroll
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail
source "${VENV:-$HOME/eggroll/.venv}/bin/activate" # on a shared file system, the same for all nodes

run=runs/halfcheetah-cluster
port=6379
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 { print $1 }')

# --block keeps a step alive as long as its node works; srun ends them all with the job.
srun --nodes=1 --ntasks=1 -w "${nodes[0]}" ray start --head --node-ip-address="$head" --port=$port \
    --num-cpus="$SLURM_CPUS_PER_TASK" --include-dashboard=false --block &
sleep 15
if [ "${#nodes[@]}" -gt 1 ]; then
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="${nodes[0]}" \
        ray start --address="$head:$port" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
fi

# Nodes that come later are used from the next slice on: no need to wait for all.
arguments=(HalfCheetah-v5 --output "$run" --cluster "$head:$port")
if [ -d "$run" ]; then
    arguments+=(--resume)
else
    arguments+=(--fitness episode --population-size 1280 --slice-size 10 --total-timesteps 100000000)
fi
exec eggroll-rl train "${arguments[@]}"
