"""Measurements that anyone can repeat on their own machine: `dmae-ds bench ...`. BENCHMARKS.md holds one run of them."""

from dmae_ds.bench.teacher_load import bench_teacher_load as bench_teacher_load
