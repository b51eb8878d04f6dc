"""Train a ResNet with dense or tensor-network convolutions: python benchmarks/train.py --config configs/digits-tr.yaml.

Several presets are the arms of a comparison, and with --seeds each arm runs once per seed:

    python benchmarks/train.py --config configs/digits-dense.yaml configs/digits-tr.yaml --seeds 0 1 2 \
        --results benchmarks/results/digits.csv --overwrite

Every other flag overrides the presets. Accuracy is that of the last epoch: none is picked by looking at test images.

On several processes the same command runs under a launcher, with the same losses but for rounding:

    torchrun --nproc-per-node 8 benchmarks/train.py --config configs/cifar10-tr.yaml

Each takes its part of every batch; batch_size is of all together. With --shard they share the parameters out too. The
first process writes, and reads the checkpoint for all.

A run that was killed goes on from its last checkpoint with --resume, to the same numbers as if it had not been. SIGTERM
and SIGHUP end it after the step or the evaluation it is in, with a checkpoint and with exit code 128 + the signal's
number. Several processes end together, where their losses are added up: REPORT_EVERY steps later at most.
"""

from benchmarks.training.command import main

if __name__ == "__main__":
    main()
