"""The page and its figures: self-contained, with a dark mode, with an alarm for what is wrong."""

import base64
import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmae_ds.output.theme import COLOURS
from dmae_ds.report import name_runs, write_report
from dmae_ds.report.write import NO_TEACHER, NOT_MEASURED
from tests.evaluate.conftest import Metrics, make_run
from tests.messages import refused
from tests.report.conftest import ODD_NAME


class _Balance(HTMLParser):
    """Parser that raises at unbalanced tags, and collects links, tags and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.words, self.ids = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "srcset", "action", "data")
        ]
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


def test_the_page_makes_no_requests(reported, parsed):
    assert parsed.links and all(link.startswith(("#", "data:image/png;base64,")) for link in parsed.links)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert re.findall(r"https?://[^\s\"'<]*", re.sub(r'xmlns(:\w+)?="[^"]*"', "", reported[0])) == []
    targets = re.findall(r"url\(([^)]*)\)", reported[0])
    assert all(target.startswith("#") for target in targets) and "@import" not in reported[0]


def test_every_reference_within_the_page_has_its_target(reported, parsed):
    wanted = {link[1:] for link in parsed.links if link.startswith("#")} | set(
        re.findall(r"url\(#([^)]*)\)", reported[0])
    )
    assert wanted and wanted <= set(parsed.ids)


def test_names_are_escaped(reported, parsed):
    # Title, heading, alarm, table, legend, images.
    assert "u" not in parsed.tags and "".join(parsed.words).count(ODD_NAME) >= 4
    legend = reported[0][reported[0].index("<svg") : reported[0].index("</svg>")]
    assert "&lt;u&gt;&amp;$x$" in legend


def test_every_colour_of_a_figure_has_a_dark_one(reported):
    page = reported[0]
    figures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    used = set(re.findall(r"var\((--[\w-]+)\)", page)) - {"--columns"}  # of a board's grid
    assert {"--series-0", "--series-1", "--ink", "--soft", "--line", "--alarm"} <= used <= set(COLOURS)
    # A colour that is left would be the same in light and dark mode.
    assert set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]+)", figures)) == set()
    light, dark = re.search(
        r":root\{(.*?)\}@media\(prefers-color-scheme:dark\)\{:root\{(.*?)\}", page
    ).groups()
    assert all(f"{name}:" in light and f"{name}:" in dark for name in COLOURS)


def test_a_dead_term_and_a_collapse_are_alarms(reported, parsed):
    alarms = re.findall(r'<p class="alarm".*?</p>', reported[0], re.DOTALL)
    assert len(alarms) == 2 and all("&lt;u&gt;" in alarm for alarm in alarms)
    assert "Dead term" in alarms[0] and "2.0%" in alarms[0]
    assert "Collapse" in alarms[1] and "1.2 " in alarms[1]


def test_facts_and_knn_are_in_one_table(parsed):
    text = "|".join(word for word in parsed.words if word.strip())
    assert "k-NN top-1|not measured|dmae-ds eval knn" in text
    assert "71.2%|k 20, T 0.07, mean pool; 1,400 train, 397 val; step 30" in text
    assert "|align/1-3 at the end|2.0000|-|" in text


def boards(page, title):
    """The boards of a section, one for each run: [(label of a row, its images)]."""
    section = page[page.index(f"<h2>{title}</h2>") :].partition("<h2>")[2].partition("<h2>")[0]
    runs = []
    for run in section.split("<h3>")[1:]:
        rows = re.findall(r"<span>([^<]+)</span>((?:<img [^>]*>)+)", run)
        runs.append([(label, list(map(decode, re.findall('src="(.*?)"', images)))) for label, images in rows])
    return runs


def decode(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def test_images_are_the_same_for_both_runs(reported):
    first, second = (dict(board) for board in boards(reported[0], "Reconstructions"))
    assert list(first) == ["original", "visible", "reconstructed"]
    assert all(len(row) == 6 and row[0].shape == (16, 16, 3) for row in first.values())
    for row in ("original", "visible"):
        assert all((one == other).all() for one, other in zip(first[row], second[row], strict=True))
    assert all(
        (one != other).any()
        for one, other in zip(first["reconstructed"], second["reconstructed"], strict=True)
    )
    assert (first["original"][0] != first["visible"][0]).any()
    assert (first["original"][0] != first["original"][1]).any()


def test_masks_of_rising_ratios_are_nested(reported):
    board = boards(reported[0], "Reconstructions at other mask ratios")[0]
    assert [label for label, _ in board] == ["visible", "reconstructed"] * 2
    for (_, visible), (_, reconstructed) in zip(board[::2], board[1::2], strict=True):
        masked = [(image == 128).all(axis=2) for image in visible]
        assert [mask.mean() for mask in masked] == [0, 0.5, 0.75, 0.875, 0.9375]  # of 16 patches
        assert all((more >= less).all() for less, more in itertools.pairwise(masked))
        assert all(
            (image == reconstructed[0])[~mask].all()
            for image, mask in zip(reconstructed, masked, strict=True)
        )


def test_every_view_has_its_rows_and_no_two_are_alike(reported):
    for title, expected in (
        (
            "Patch features as colours",
            [
                ["original", "student, last", "student, block 1", "teacher, block 3"],
                ["original", "student, last", "teacher, block 3"],
            ],
        ),
        ("Attention of CLS", None),
    ):
        of_runs = boards(reported[0], title)
        if expected is not None:
            assert [[label for label, _ in board] for board in of_runs] == expected
        for board in of_runs:
            assert len(board) in (3, 4) and all(len(row) == 6 for _, row in board)
            maps = [row for label, row in board if label != "original"]
            assert all(image.shape == (4, 4, 3) and image.std() > 10 for row in maps for image in row)
            assert all((one[0] != other[0]).any() for one in maps for other in maps if one is not other)


def test_both_runs_are_compared_with_the_one_teacher(reported):
    grids = re.findall(
        r"<svg.*?</svg>", reported[0][reported[0].index("Similarity of student") :], re.DOTALL
    )[:2]
    assert "&lt;u&gt;&amp;$x$ and its teacher" in grids[0]
    assert "plain and &lt;u&gt;&amp;$x$'s teacher" in grids[1].replace("&#x27;", "'")
    assert all(len(re.findall(">[-.][0-9]+<|>1<", grid)) >= 8 for grid in grids)  # 2 x 4 blocks
    assert grids[0] != grids[1].replace("plain", "")


def test_figures_are_written_next_to_the_page_and_are_not_empty(reported):
    figures = reported[1] / ODD_NAME / "comparison-figures"
    assert not (reported[1] / ODD_NAME / "figures").exists()
    charts = {
        "loss",
        "pixel",
        "align-1-3",
        "share-1",
        "knn",
        "rank-mean",
        "rank-cls",
        "norm-1",
        "norm-last",
        "images_per_s",
        "seconds",
    }
    views = {
        f"{view}-{name}"
        for view in ("pictures", "ratios", "cka", "patches", "attention")
        for name in ("-u---x-", "plain")
    }
    assert {path.stem for path in figures.iterdir()} == charts | views
    blue, orange = (
        [int(COLOURS[f"--series-{place}"][0][start : start + 2], 16) for start in (1, 3, 5)]
        for place in (0, 1)
    )
    for name, colours in (
        ("pixel", (blue, orange)),
        ("align-1-3", (blue,)),
        ("share-1", (blue,)),
        ("knn", (orange,)),
        ("rank-cls", (blue,)),
    ):
        pixels = np.asarray(Image.open(figures / f"{name}.png").convert("RGB"))
        for colour in colours:
            assert (np.abs(pixels.astype(int) - colour).max(axis=2) < 12).sum() > 200, (name, colour)
    assert np.asarray(Image.open(figures / "pictures-plain.png").convert("L")).std() > 20


def test_a_page_is_written_twice_with_equal_bytes(reported):
    page, folder = reported
    out = write_report([folder / ODD_NAME, folder / "plain"], folder / "again.html")
    assert out == folder / "again.html" and out.read_text(encoding="utf-8") == page


def test_a_healthy_run_alone_has_no_alarm_and_no_curve_twice(tmp_path, shards):
    run = make_run(tmp_path / "run", train=shards[0], val=shards[1], objective="mae")
    page = write_report([run]).read_text()
    assert 'role="alert"' not in page and page.count("<svg") == 1 + 3 + 2
    assert not (run / "figures" / "loss.png").exists() and (run / "figures" / "pixel.png").exists()
    assert NO_TEACHER in page


def test_a_run_of_an_older_version_shows_what_it_measured(tmp_path, shards):
    run = make_run(tmp_path / "run", train=shards[0], val=shards[1], metrics=Metrics(rank=None))
    page = write_report([run]).read_text()
    assert NOT_MEASURED in page and page.count("<svg") == 4 + 1
    assert boards(page, "Attention of CLS")


def test_the_keys_that_differ_stand_before_everything_else(reported):
    page, _ = reported
    table = page[page.index('class="keys"') : page.index("k-NN top-1")]
    rows = dict(re.findall('<th scope="row">([^<]*)</th>(.*?)</tr>', table))
    assert re.findall("<td>([^<]*)</td>", rows["objective.name"]) == ["dmae", "mae"]
    assert re.findall("<td>([^<]*)</td>", rows["objective.norm_pix"]) == ["false", "true"]
    assert "run.dir" not in rows and "optim.base_lr" not in rows


def test_a_page_without_images_is_written_and_says_so(tmp_path, shards, capsys):
    run = make_run(tmp_path / "run", train=shards[0], val=shards[1])
    (run / "student.safetensors").unlink()
    page = write_report([run]).read_text()
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in ("run:", "pictures", "cka", "student.safetensors"))
    assert 'class="keys"' not in page
    assert page.count('class="missing"') == 5 and "student.safetensors" in page
    assert "data:image" not in page and page.count("<svg") == 4 + 4 + 2


def test_mistakes_are_one_line(tmp_path, shards):
    run = make_run(tmp_path / "run", train=shards[0], val=shards[1])
    empty = make_run(tmp_path / "empty", train=shards[0], val=shards[1], metrics=Metrics(num_steps=0))
    other, folder = tmp_path / "other.html", tmp_path / "folder.html"
    other.write_text("<title>by hand</title>")
    folder.mkdir()
    for runs, out, word in (
        ([tmp_path], None, tmp_path),
        ([run, empty], None, f"'{empty}'"),
        ([run, run], None, f"{run}, {run}"),
        ([run], tmp_path / "nowhere" / "page.html", f"'{tmp_path / 'nowhere'}'"),
        ([run], other, f"'{other}'"),
        ([run], folder, f"'{folder}'"),
    ):
        with refused(word):
            write_report(runs, out)
    assert not (run / "figures").exists() and not (run / "report.html").exists()
    assert other.read_text() == "<title>by hand</title>"


def test_runs_are_named_by_what_tells_them_apart():
    assert name_runs([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert name_runs([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a/x", "b/x", "b/y"]
