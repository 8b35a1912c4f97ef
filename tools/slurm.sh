#!/bin/bash
# Runs pretrain.py under SLURM, one task per GPU, and requeues it when its time is over. From the project's root:
#
#     sbatch tools/slurm.sh --recipe k400 --data k400/train.txt --compile
#
# torchrun is left out: it kills its ranks 30 s after SIGTERM and hides the exit code. --signal=TERM@120 reaches the
# tasks (B:TERM@120 would reach this script alone); --log-every steps and a checkpoint must take less than these 120 s.
# --kill-on-bad-exit=0 lets rank 0 finish the checkpoint.
#SBATCH --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=16 --time=24:00:00
#SBATCH --signal=TERM@120 --requeue --open-mode=append --output=pretrain.log
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500
srun --cpus-per-task=16 --kill-on-bad-exit=0 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID \
    WORLD_SIZE=$SLURM_NTASKS exec python pretrain.py "$@"' _ "$@"
code=$?
[ $code = 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
