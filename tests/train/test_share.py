"""`data.share`: a run on a part of the images, which has its own epochs; evaluations read all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dmae_ds.config.load import dump_config, load_config
from dmae_ds.data.order import share_ids
from dmae_ds.distributed.world import World
from dmae_ds.evaluate.source import find_sources
from dmae_ds.objectives.build import build_objective
from dmae_ds.plan.feeding import IMAGENET, count_images
from dmae_ds.teacher.cache_manifest import recipe_identity
from dmae_ds.train.inputs import batch_spec, training_batches
from dmae_ds.train.preflight import prepare
from tests.evaluate.conftest import make_shards
from tests.messages import refused

TINY = ["student.img_size=16", "student.embed_dim=16", "student.depth=1", "student.num_heads=2"]
BATCH = ["optim.global_batch=3", "optim.epochs=4", "optim.warmup_epochs=1", "data.num_workers=0"]


@pytest.fixture
def recipe(tmp_path):
    """Overrides of a recipe on 24 images."""
    train = make_shards(tmp_path / "train", num=24, seed=0)
    return [*TINY, *BATCH, f"data.train={train}", f"data.val={train}", f"run.dir={tmp_path / 'run'}"]


def test_shares_are_nested_and_drawn_from_everywhere():
    for num in (1, 7, 24, 1000):
        ids = [share_ids(num, share) for share in (0.01, 0.25, 0.5, 1.0)]
        for smaller, larger in itertools.pairwise(ids):
            assert set(smaller.tolist()) <= set(larger.tolist())
        assert ids[-1].tolist() == list(range(num)) and len(ids[0]) == max(1, round(num * 0.01))
    quarter = share_ids(1000, 0.25)
    assert len(quarter) == 250 and (np.diff(quarter) > 0).all()
    halves = np.histogram(quarter, bins=4, range=(0, 1000))[0]
    assert halves.min() > 40  # of 62.5 expected


def test_a_run_trains_on_these_images_alone_each_once_an_epoch(recipe):
    config = load_config("digits_mae", [*recipe, "data.share=0.25"])
    preflight = prepare(config, World(), resume="never")
    assert (preflight.num_images, preflight.num_steps) == (6, 8)
    assert preflight.identity["num_samples"] == 6
    distilled = load_config(
        "digits_dmae", [*recipe, "data.share=0.25"]
    )  # stored features are of the same images
    assert recipe_identity(distilled, distilled.teacher, preflight.shards)["data.train (images)"] == 6
    objective, _ = build_objective(config)
    sizes = {"world": World(), "micro_batch": 3, "accumulation": 1}
    spec = batch_spec(config, objective, **sizes, num_samples=preflight.shards.num_samples)
    batches = training_batches(config, preflight.shards, spec, stop_step=8, pin_memory=False)
    ids = [batch.sample_ids.tolist() for batch in batches]
    expected = share_ids(24, 0.25).tolist()
    epochs = [sorted(ids[step] + ids[step + 1]) for step in range(0, 8, 2)]
    assert epochs == [expected] * 4 and len({str(each) for each in ids}) > 2  # in a new order each epoch
    # The validation set is whole, and so is a training set of which no share is taken.
    assert batch_spec(config, objective, **sizes).subset is None
    whole = load_config("digits_mae", recipe)
    assert batch_spec(whole, objective, **sizes, num_samples=24).subset is None
    assert prepare(whole, World(), resume="never").num_steps == 32


def test_a_run_does_not_go_on_with_another_share(recipe):
    begun = prepare(load_config("digits_mae", [*recipe, "data.share=0.5"]), World(), resume="never")
    begun.folder.begin(1)
    begun.folder.commit(1, {"step": 1, **begun.identity}, {})
    assert prepare(begun.config, World(), resume="auto").is_resumed
    with refused("num_samples 12", "this run 6", "data.share"):
        prepare(load_config("digits_mae", [*recipe, "data.share=0.25"]), World(), resume="auto")


def test_an_evaluation_of_the_run_reads_all_images(recipe, tmp_path):
    config = load_config("digits_mae", [*recipe, "data.share=0.25"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    (plain,) = find_sources([str(run)])
    (same,) = find_sources([str(run), f"data.val={config.data.val}"])
    (other,) = find_sources([str(run), "data.val=elsewhere"])
    assert plain.results == same.results == run != other.results
    assert same.data.train == config.data.train and not hasattr(same.data, "share")
    with refused("data.share", "unknown"):
        find_sources([str(run), "data.share=0.5"])


def test_a_plan_counts_the_share():
    data = load_config("mae_vit_base", ["data.train=nowhere", "data.share=0.1"]).data
    images = count_images(data, None)
    assert images.number == round(0.1 * IMAGENET) and "data.share 0.1" in images.source
    assert count_images(data, 500).number == 50


@pytest.mark.parametrize(
    "words, expected",
    [
        (["data.share=0"], ("data.share", "0")),
        (["data.share=1.5"], ("data.share", "1.5")),
        (["data.share=0.5", "data.block=16"], ("data.share", "data.block")),
        (["data.share=0.5", "data.num_samples=10"], ("data.share", "data.num_samples")),
    ],
)
def test_a_share_that_cannot_be_drawn_is_refused(words, expected):
    with refused(*expected):
        load_config("digits_mae", words)
