"""Measurements that you can repeat on your machine: `dmae-ds bench ...`. BENCHMARKS.md has those of ours."""

from dmae_ds.bench.teacher_load import bench_teacher_load as bench_teacher_load
