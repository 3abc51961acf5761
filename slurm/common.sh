# shellcheck shell=bash disable=SC2034,SC2016,SC1091
# What the batch scripts of this folder share; they source it. Submit from the repository's root, on a file system that
# all nodes see: sbatch slurm/train_torchrun.sbatch --uplink sign
#
# From the environment that sbatch hands on: OUT=DIR, the run's folder (default: runs/slurm-<job>); RANKS_PER_NODE=N
# (default: one a GPU, or one on nodes without).
set -euo pipefail

# The environment that was active at sbatch is inherited; without one, .venv is taken. For conda write here instead:
#   . "$(conda info --base)/etc/profile.d/conda.sh" && conda activate fedq
[[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} || ! -f .venv/bin/activate ]] || . .venv/bin/activate

# Prints where the ranks meet. The name of the first node if it resolves (a name, because on the node itself it may
# resolve to a loopback address), otherwise the address by which SLURM goes.
master_addr() {
  local hosts
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  if getent hosts "${hosts[0]}" >/dev/null; then
    echo "${hosts[0]}"
  else
    scontrol --oneliner show node "${hosts[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
  fi
}

# Starts so many tasks on every node and returns their exit code: run_step 1 COMMAND... When the job's time is nearly
# over (SIGUSR1, from #SBATCH --signal) the job goes back into the queue, as it does by itself when it is preempted or a
# node fails.
run_step() {
  local tasks=$1 flags=(--cpus-per-task=$((cpus > $1 ? cpus / $1 : 1))) code=0 step
  ((tasks <= cpus)) || flags+=(--overcommit)
  trap 'echo "time is nearly over: requeued"; scontrol requeue "$SLURM_JOB_ID"' USR1
  srun --ntasks=$((tasks * SLURM_NNODES)) --ntasks-per-node="$tasks" --kill-on-bad-exit=1 "${flags[@]}" "${@:2}" &
  step=$!
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do  # a signal has ended the wait, and not the step
    code=0
    wait "$step" || code=$?
  done
  return "$code"
}

# Starts train.py with these flags by torchrun. Static, and not the c10d rendezvous: rank 0 is then on the first node,
# and no node looks up its own name.
train_with_torchrun() {
  run_step 1 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
    --nproc-per-node "$RANKS_PER_NODE" --rdzv-backend static \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" train.py "$@"' torchrun "$@"
}

for argument in "$@"; do
  if [[ $argument == --@(out|resume)?(=*) ]]; then
    echo "error: $argument: the run's folder is told as OUT=DIR sbatch ..., and resumed by itself" >&2
    exit 2
  fi
done

out=${OUT:-runs/slurm-$SLURM_JOB_ID}
ranks_per_node=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
cpus=${SLURM_CPUS_PER_TASK:-1}
threads=$((cpus > ranks_per_node ? cpus / ranks_per_node : 1))

export NUM_RANKS=$((SLURM_NNODES * ranks_per_node)) RANKS_PER_NODE=$ranks_per_node
# Of its own for each job, array tasks included, so that jobs on one node do not meet; below the ports that Linux hands
# out to outgoing connections.
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
MASTER_ADDR=$(master_addr)
export MASTER_ADDR
export OMP_NUM_THREADS=$threads

# A job that was requeued has its old number, so it finds its run and goes on with it. The user's flags come last and
# go over these.
if [[ -f $out/config.yaml ]]; then
  arguments=(--resume "$out" --threads "$threads" "$@")
else
  arguments=(--out "$out" --threads "$threads" "$@")
fi
echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $NUM_RANKS rank(s) on $SLURM_JOB_NODELIST," \
  "meeting at $MASTER_ADDR:$MASTER_PORT, run in $out"
