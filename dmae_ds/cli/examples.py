"""Examples below the help of every command, in one place: tests/cli/test_help.py parses each of them."""

from __future__ import annotations

import argparse

RECIPE = "dmae_vit_large_to_base"
RUN = f"runs/{RECIPE}"
WEIGHTS = "teacher.weights=mae_pretrain_vit_large.pth"

# {command: its examples, without `dmae-ds` and the command}
EXAMPLES = {
    "distill": (
        "photos --teacher mae_pretrain_vit_base.pth --student vit_small_patch16_224",
        "photos --teacher vit_base_patch14_dinov2.lvd142m --student vit_small_patch16_224 --epochs 200 "
        "run.dir=runs/photos",
    ),
    "train": (
        "digits_dmae",
        f"{RECIPE} {WEIGHTS} --dry-run",
        f"{RECIPE} {WEIGHTS} objective.mask_ratio=0.9 run.dir=runs/mask90 --resume auto",
    ),
    "recipes": ("", "digits_dmae", "--all knn"),
    "doctor": (f"{RECIPE} {WEIGHTS}", f"{RECIPE} {WEIGHTS} --hostfile hostfile"),
    "checkpoint inspect": (RUN,),
    "checkpoint verify": (RUN,),
    "checkpoint convert": (f"{RUN} universal",),
    "plan": (
        f"{RECIPE} --gpus 8 --gpu-memory-gib 24",
        f"{RECIPE} precision=bf16_autocast optim.micro_batch=32 --gpus 16 --gpus-per-node 8",
    ),
    "eval knn": (
        RUN,
        f"{RUN} runs/mask90 --k 10 20 --labels all 10%",
        f"{RUN} data.train=shards/other/train data.val=shards/other/val",
        "dinov2.pth network.name=vit_base_patch14_dinov2 data.train=shards/train data.val=shards/val "
        "run.dir=runs/dinov2",
    ),
    "eval probe": (RUN, f"{RUN} --pool cls"),
    "eval dense": (
        f"{RUN} data.train=shards/ade20k/train data.val=shards/ade20k/val",
        f"{RUN} --task knn linear --iterations 2000 --warmup 100",
    ),
    "eval agreement": (RUN, f"{RUN} data.val=shards/other --k 10"),
    "eval finetune": (
        f"{RUN} --recipe finetune_dmae",
        "student.safetensors network.name=vit_base_patch16_224 data.train=shards/train data.val=shards/val "
        "run.dir=runs/tuned",
    ),
    "eval linear": (f"{RUN} --labels 10%", "runs/digits/dmae --recipe linear_digits"),
    "eval segment": (
        f"{RUN} data.train=shards/ade20k/train data.val=shards/ade20k/val precision=bf16",
        f"{RUN} --recipe linear_segment_ade20k data.train=shards/ade20k/train data.val=shards/ade20k/val",
    ),
    "eval detect": (
        f"{RUN} data.train=shards/coco/train data.val=shards/coco/val precision=bf16",
        f"{RUN} --recipe maskrcnn_1x_coco data.train=shards/coco/train data.val=shards/coco/val",
    ),
    "export": (f"{RUN} --to hf --license cc-by-nc-4.0", f"{RUN} --to onnx --out student_onnx"),
    "report": (
        RUN,
        f"{RUN} runs/mask90 --out mask.html",
        "--results runs",
        "--results digits=runs/study scenes=runs/scenes",
    ),
    "teacher inspect": ("mae_pretrain_vit_large.pth",),
    "teacher slice": ("mae_pretrain_vit_large.pth teacher_in_4 --stages 4 --last-block 18 --dtype bf16",),
    "teacher stats": (f"{RECIPE} {WEIGHTS} --images 2000",),
    "teacher cache": (
        f"{RECIPE} features {WEIGHTS} optim.micro_batch=64 --epochs 8 --dtype bf16",
        f"{RECIPE} features {WEIGHTS} optim.micro_batch=64 --dtype int8 --pca 256",
    ),
    "bench step": (f"{RECIPE} optim.global_batch=8 --against mae",),
    "bench growth": ("digits_dmae", "digits_dmae --widths 32 64 128 --students 1 2 3 --plot growth.png"),
    "bench teacher-load": ("--name vit_base_patch16_224 --stages 1 2",),
    "bench stream": ("digits_dmae --stages 2",),
    "bench cache": ("digits_dmae --dtype fp32 int8",),
    "bench save": ("digits_dmae --folder /tmp",),
    "bench knn": ("--train 100000 --queries 512",),
    "launch-files": (".", "cluster"),
    "bench gpu": ("runs/gpu_check", "runs/rehearsal --rehearse"),
}


def add_examples(root: argparse.ArgumentParser) -> None:
    """Show the examples at the end of each command's help, as they stand."""
    for name, parser in commands_below(root).items():
        lines = [f"  {root.prog} {name} {example}".rstrip() for example in EXAMPLES.get(name, ())]
        if lines:
            parser.formatter_class = argparse.RawDescriptionHelpFormatter
            parser.epilog = "\n".join(["examples:", *lines])


def commands_below(root: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Parsers of all commands by what is typed after the program's name, the root's own under ""."""
    commands, todo = {}, [("", root)]
    while todo:
        name, command = todo.pop()
        commands[name] = command
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                todo += [(f"{name} {word}".strip(), child) for word, child in action.choices.items()]
    return commands
