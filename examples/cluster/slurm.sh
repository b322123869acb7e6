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
head=$(srun --nodes=1 --ntasks=1 -w "${nodes[0]}" hostname -I | awk '{ print $1 }') # not 127.0.1.1
# Other users of the machines must not talk to this Ray: the token is in your home, on all nodes.
ray get-auth-token --generate > /dev/null
export RAY_AUTH_MODE=token
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # which srun does not take from the job by itself

# --block keeps a step alive as long as its node works; they end with the job.
srun --nodes=1 --ntasks=1 -w "${nodes[0]}" ray start --head --node-ip-address="$head" --port=$port \
    --num-cpus="$SLURM_CPUS_PER_TASK" --include-dashboard=false --block &
for _ in $(seq 60); do # until the head answers
    if (: > "/dev/tcp/$head/$port") 2> /dev/null; then break; fi
    sleep 2
done
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
