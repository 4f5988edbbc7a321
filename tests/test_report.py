"""The page and its figures: needs nothing but itself, reads in the dark, says what is wrong in plain words."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dmae_ds.errors import UserError
from dmae_ds.figures import COLOURS, Curve, draw_curves, thin_out, to_png, to_svg
from dmae_ds.report import name_runs, write_report
from tests.evaluate.conftest import make_run, make_shards

ODD_NAME = "<u>&$x$"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder / "train", num=20, seed=1), make_shards(folder / "val", num=11, seed=2)


@pytest.fixture(scope="module")
def reported(tmp_path_factory, shards):
    """(page, folder): a dead DMAE run with a name to trip over, beside a plain MAE run with norm_pix; one has its k-NN."""
    folder = tmp_path_factory.mktemp("runs")
    dead = make_run(folder / ODD_NAME, train=shards[0], val=shards[1], share=0.02)
    plain = make_run(folder / "plain", train=shards[0], val=shards[1], objective="mae", norm_pix=True)
    knn = {"top1": 71.25, "k": 20, "temperature": 0.07, "pool": "mean", "num_train": 1400, "num_val": 397, "step": 30}
    (plain / "knn.json").write_text(json.dumps(knn))
    out = write_report([dead, plain])
    assert out == dead / "report.html" and not list(folder.rglob("*.tmp"))
    return out.read_text(encoding="utf-8"), folder


class _Balance(HTMLParser):
    """Raises where a tag closes what was not open, and collects links, tags and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.words, self.ids = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "action", "data")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def parsed(reported):
    parser = _Balance()
    parser.feed(reported[0])
    parser.close()
    assert not parser.open
    return parser


def test_the_page_asks_for_nothing(reported, parsed):
    assert parsed.links and all(link.startswith(("#", "data:image/png;base64,")) for link in parsed.links)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert re.findall(r"https?://[^\s\"'<]*", re.sub(r'xmlns(:\w+)?="[^"]*"', "", reported[0])) == []
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", reported[0])) and "@import" not in reported[0]


def test_every_reference_within_the_page_arrives(reported, parsed):
    wanted = {link[1:] for link in parsed.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", reported[0]))
    assert wanted and wanted <= set(parsed.ids)


def test_names_are_escaped(reported, parsed):
    assert "u" not in parsed.tags and "".join(parsed.words).count(ODD_NAME) >= 4  # title, heading, alarm, table, legend, pictures
    legend = reported[0][reported[0].index("<svg") : reported[0].index("</svg>")]
    assert "&lt;u&gt;&amp;$x$" in legend


def test_every_colour_of_a_figure_has_a_dark_one(reported):
    page = reported[0]
    figures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert {"--series-0", "--series-1", "--ink", "--soft", "--line", "--alarm"} <= used <= set(COLOURS)
    # Whatever colour is left would be the same on both pages.
    assert set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]+)", figures)) == set()
    light, dark = re.search(r":root\{(.*?)\}@media\(prefers-color-scheme:dark\)\{:root\{(.*?)\}", page).groups()
    assert all(f"{name}:" in light and f"{name}:" in dark for name in COLOURS)


def test_a_dead_term_is_told_in_plain_words(reported, parsed):
    alarms = re.findall(r'<p class="alarm".*?</p>', reported[0], re.DOTALL)
    assert len(alarms) == 1 and "only 2.0% of the gradient" in alarms[0] and "&lt;u&gt;" in alarms[0]


def test_facts_and_knn_stand_side_by_side(parsed):
    text = "|".join(word for word in parsed.words if word.strip())
    assert "k-NN top-1|not measured|dmae-ds eval knn" in text and "71.2%|k 20, T 0.07, mean pool; 1,400 train, 397 val; step 30" in text
    assert "|align/1-3 at the end|2.0000|-|" in text


def test_pictures_are_there_and_the_same_for_both_runs(reported, parsed):
    pictures = [link for link in parsed.links if link.startswith("data:")]
    assert len(pictures) == 16
    strips = [np.asarray(Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2])))) for link in pictures]
    assert all(strip.shape == (3 * 16 + 2, 16, 4) for strip in strips)
    first, second = strips[0], strips[8]
    assert (first[:16] == second[:16]).all() and (first[17:33] == second[17:33]).all() and (first[34:] != second[34:]).any()
    assert (first[:16] != first[17:33]).any() and (first[17:33] != first[34:]).any()


def test_pictures_are_painted_by_the_runs_own_weights(tmp_path, shards):
    run = make_run(tmp_path / "run", train=shards[0], val=shards[1])
    weights = load_file(run / "decoder.safetensors")
    save_file({**weights, "decoder.pred.bias": weights["decoder.pred.bias"] + 100}, run / "decoder.safetensors")
    link = re.search('"data:image/png;base64,(.*?)"', write_report([run]).read_text()).group(1)
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(link))))
    original, painted = strip[:16, :, :3], strip[34:, :, :3]
    visible, white = (painted == original).all(axis=2), (painted == 255).all(axis=2)
    assert white.mean() == 0.75 and (visible | white).all()


def test_figures_lie_beside_the_page_and_show_something(reported):
    figures = reported[1] / ODD_NAME / "figures"
    assert {path.name for path in figures.iterdir()} == {"loss.png", "pixel.png", "align-1-3.png", "share-1.png", "pictures--u---x-.png", "pictures-plain.png"}
    blue, orange = ([int(COLOURS[f"--series-{place}"][0][start : start + 2], 16) for start in (1, 3, 5)] for place in (0, 1))
    for name, colours in (("pixel", (blue, orange)), ("align-1-3", (blue,)), ("share-1", (blue,))):
        pixels = np.asarray(Image.open(figures / f"{name}.png").convert("RGB"))
        for colour in colours:
            assert (np.abs(pixels.astype(int) - colour).max(axis=2) < 12).sum() > 200, (name, colour)
    assert np.asarray(Image.open(figures / "pictures-plain.png").convert("L")).std() > 20


def test_a_page_is_written_twice_alike(reported):
    page, folder = reported
    out = write_report([folder / ODD_NAME, folder / "plain"], folder / "again.html")
    assert out == folder / "again.html" and out.read_text(encoding="utf-8") == page


def test_a_live_run_alone_has_no_alarm_and_no_curve_twice(tmp_path, shards):
    run = make_run(tmp_path / "run", train=shards[0], val=shards[1], objective="mae")
    page = write_report([run]).read_text()
    assert "Dead term" not in page and page.count("<svg") == 1
    assert not (run / "figures" / "loss.png").exists() and (run / "figures" / "pixel.png").exists()


@pytest.mark.parametrize("spoil, reason", [
    (lambda run: (run / "student.safetensors").unlink(), "no student.safetensors yet"),
    (lambda run: (run / "decoder.safetensors").write_bytes(b"half"), "decoder.safetensors is not a whole safetensors file"),
    (lambda run: shutil.rmtree(run.parent / "val"), "is not a shard folder"),
    (lambda run: (run / "config.yaml").write_text(re.sub("val: .*", "val: null", (run / "config.yaml").read_text())), "data.val is null"),
])  # fmt: skip
def test_without_pictures_the_page_stands_and_says_why(tmp_path, shards, spoil, reason):
    shutil.copytree(shards[1], tmp_path / "val")
    run = make_run(tmp_path / "run", train=shards[0], val=tmp_path / "val")
    spoil(run)
    page = write_report([run]).read_text()
    assert reason in page and "data:image" not in page and page.count("<svg") == 4


def test_mistakes_are_one_line(tmp_path, shards):
    run = make_run(tmp_path / "run", train=shards[0], val=shards[1])
    empty = make_run(tmp_path / "empty", train=shards[0], val=shards[1], num_steps=0)
    for runs, out, message in (
        ([tmp_path], None, "not a run folder"),
        ([run, empty], None, "'.*empty' has no metrics yet"),
        ([run, run], None, "named twice"),
        ([run], tmp_path / "nowhere" / "page.html", "there is no folder '.*nowhere'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            write_report(runs, out)
        assert "\n" not in str(error.value)
    assert not (run / "figures").exists() and not (run / "report.html").exists()


def test_runs_are_named_by_what_tells_them_apart():
    assert name_runs([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert name_runs([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a/x", "b/x", "b/y"]


def test_a_long_curve_is_drawn_as_means_and_a_short_one_as_it_is():
    epochs, values, stretch = thin_out([0, 1, 2, 3, 4], [1, 3, 5, 7, 100], max_points=3)
    assert (epochs.tolist(), values.tolist(), stretch) == ([0.5, 2.5, 4], [2, 6, 100], 2)
    assert thin_out([1, 2], [3, 4])[1].tolist() == [3, 4]
    long = draw_curves("long", [Curve("run", 0, list(range(100_000)), [1.0] * 100_000)])
    assert len(to_svg(long)) < 40_000


def test_a_share_is_drawn_from_zero_to_one_with_the_mark_of_a_dead_term():
    figure = draw_curves("share", [Curve("run", 0, [0, 1], [0.4, 0.5])], share=True)
    assert figure.axes[0].get_ylim() == (0, 1)
    svg = to_svg(figure)
    assert "dead term below 5%" in svg and "dead term" not in to_svg(draw_curves("loss", [Curve("run", 0, [0, 1], [0.4, 0.5])]))
    assert to_png(figure)[:4] == b"\x89PNG"
