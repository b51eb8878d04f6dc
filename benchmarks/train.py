"""Train a ResNet with dense or tensor-network convolutions: python benchmarks/train.py --config configs/digits-tr.yaml.

Several presets are the arms of a comparison, and with --seeds each arm runs once per seed:

    python benchmarks/train.py --config configs/digits-dense.yaml configs/digits-tr.yaml --seeds 0 1 2 \
        --results benchmarks/results/digits.csv --overwrite

Every other flag overrides the presets. The reported accuracy is that of the last epoch, not of the best one.

The same command runs in several processes under a launcher. The losses are the same, up to rounding:

    torchrun --nproc-per-node 8 benchmarks/train.py --config configs/cifar10-tr.yaml

Each process takes its part of every batch. batch_size counts the images of all processes. --shard also shards the
parameters. Only the first process writes files and reads the checkpoint.

--resume continues a killed run from its last checkpoint, and gives the same numbers as an uninterrupted run. SIGTERM
and SIGHUP end a run after the current step or evaluation. It writes a checkpoint and exits with 128 + the signal's
number. Several processes end at the same step, where their losses are summed: at most REPORT_EVERY steps later.
"""

from benchmarks.training.command import main

if __name__ == "__main__":
    main()
