"""The run report: complete from a full run, useful from a partial one, escaped, self-contained, never half-written."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from protomem import environment as environment_module
from protomem import report, report_page, report_plots
from protomem.errors import UserError
from protomem.evaluate.verification import error_versus_reject, verify_pairs
from protomem.metrics import RunLog, read_metrics
from tests.test_verification import make_embeddings


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
    monkeypatch.setitem(report_plots.STYLE, "savefig.dpi", 40)  # drawing is the slow part, and its size proves nothing


def picture(number, kind="JPEG"):
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (112, 112), (number % 256, 80, 160)).save(file, kind)
    return file.getvalue()


PICTURES = [picture(i) for i in range(1, 32)] + [picture(0, "PNG")]
IMAGES = [PICTURES[i % 32] for i in range(480)]  # of 240 pairs


def result(noise, rendered=False):
    verification = verify_pairs(*make_embeddings(240, noise))
    verification.rendered = rendered
    verification.quality = verification.norms**2 if rendered else None
    return verification


def make_run(folder, sets=("clean", "hard"), rendered=True):
    log = RunLog(folder, total_steps=200, config={"margin": {"name": "<b>cosface</b>"}}, is_main=True, console=False)
    for tag, step, noise in (("initial", 0, 3.0), ("step-100", 100, 1.5), ("final", 200, 0.8)):
        results = {name: result(noise, rendered) for name in sets}
        report.save_evaluation(folder, tag, results, {name: IMAGES for name in sets})
        for name, verification in results.items():
            log.event("evaluation", step=step, tag=tag, name=name, **verification.summary())
        for k in range(step, min(step + 100, 200)):
            log.step(k + 1, {"loss": 3 - k / 100, "lr": 0.1, "images_per_s": 900, "data_wait": 0.01, "grad_norm": 1.0})
    log.event("checkpoint", step=200, path="checkpoints/200")
    log.close()
    return folder


class Page(HTMLParser):
    """The text and the attributes of a page; fails on tags left open."""

    def __init__(self, source):
        super().__init__()
        self.open, self.text, self.sources = [], [], []
        self.feed(source)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.text))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_full_run_gives_a_complete_page(tmp_path):
    folder = make_run(tmp_path / "my <run>")
    path = report.write_report(folder)
    assert path == folder / "report.html" and not list(folder.glob("*.tmp"))
    page = Page(path.read_text())
    final = result(0.8)
    assert f"{100 * final.accuracy:.2f} ± {100 * final.accuracy_std:.2f}" in page.text
    assert f"{100 * final.tar_at_far[1e-2]:.2f}" in page.text  # 120 impostors cannot tell a FAR of 1e-3
    assert "n/a" in page.text and "nan" not in page.text
    for text in ("my <run>", "untrained", "trained", "<b>cosface</b>", "checkpoint step 200", "torch", "least alike"):
        assert text in page.text, text
    figures = {p.stem for p in (folder / "report").glob("*.png")}
    assert figures == {"loss", "speed", "others", "accuracy", "roc", "reject", "histograms"}
    assert all(source.startswith("data:image/") for source in page.sources)  # nothing is fetched
    images = [base64.b64decode(source.split(",")[1]) for source in page.sources]
    assert {(folder / "report" / f"{name}.png").read_bytes() for name in figures} <= set(images)
    # Two images for each of 4 pairs of 4 kinds in 2 sets, each one of the pictures that were handed over.
    assert len([image for image in images if image in PICTURES]) == 2 * 4 * 4 * 2
    pairs, _ = report.extreme_pairs(final.scores, final.same)
    shown = [image for image in images if image in PICTURES][: 4 * 4 * 2]
    assert shown == [IMAGES[2 * pair + side] for pair in pairs for side in (0, 1)]


def test_rendered_faces_are_called_that(tmp_path):
    make_run(tmp_path / "a", ("clean",))
    make_run(tmp_path / "b", ("lfw",), rendered=False)
    rendered, real = (Page(report_page.headline(report.load_evaluations(tmp_path / x))).text for x in "ab")
    assert "Accuracy on rendered faces" in rendered and "clean (rendered)" in rendered
    assert "rendered" not in real


def test_thumbnails_are_the_extreme_pairs_and_wrong_ones_are_marked(tmp_path):
    scores = np.array([0.9, 0.1, 0.2, 0.95, 0.5, 0.0])
    same = np.array([True, True, False, False, True, False])
    pairs, kinds = report.extreme_pairs(scores, same, count=2)
    got = {kind: [p for p, k in zip(pairs, kinds) if k == kind] for kind in dict.fromkeys(kinds)}
    assert got == {
        "worst_genuine": [1, 4],
        "worst_impostor": [3, 2],
        "best_genuine": [0, 4],
        "best_impostor": [5, 2],
    }
    html = report_page.thumbnails(report.load_evaluations(make_run(tmp_path, ("clean",))))
    final = result(0.8)
    threshold = 1 - final.threshold / 2
    shown = re.findall(r'class="(pair|pair wrong)" title="pair (\d+): cosine (-?[\d.]+), (right|wrong)', html)
    assert len(shown) == 16
    for css, pair, score, verdict in shown:
        accepted = final.scores[int(pair)] > threshold
        assert score == f"{final.scores[int(pair)]:.3f}"
        assert (verdict == "right") == (accepted == final.same[int(pair)]) == (css == "pair")


def test_saved_evaluations_come_back_in_order_and_hold_no_pickle(tmp_path):
    make_run(tmp_path)
    report.save_evaluation(tmp_path, "step-20", {"clean": result(2.0)}, {"clean": IMAGES})
    found = report.load_evaluations(tmp_path)
    assert list(found) == ["clean", "hard"]
    assert list(found["clean"]) == ["initial", "step-20", "step-100", "final"]
    final, data = result(0.8, rendered=True), found["clean"]["final"]
    for name in ("scores", "same", "norms", "quality", "fold_accuracies"):
        np.testing.assert_array_equal(data[name], getattr(final, name))
    for key, value in final.summary().items():
        assert data["summary"][key] == pytest.approx(value, nan_ok=True)


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def disk_full(descriptor_or_path, *args):
        raise OSError("disk full")

    monkeypatch.setattr("protomem.files.os.replace", disk_full)  # the data are written, the renaming fails
    with pytest.raises(OSError, match="disk full"):
        report.save_evaluation(tmp_path, "final", {"clean": result(1.0)}, {"clean": IMAGES})
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("keep", ["metrics.jsonl", "evaluations"])
def test_half_a_run_still_gives_a_page(tmp_path, keep):
    make_run(tmp_path)
    for path in [p for p in tmp_path.rglob("*") if p.is_file() and keep not in str(p)]:
        path.unlink()
    page = Page(report.write_report(tmp_path).read_text())
    assert ("Best and worst pairs" in page.text) == (keep == "evaluations")
    assert ("no evaluation yet" in page.text) == ((tmp_path / "report/loss.png").exists()) == (keep == "metrics.jsonl")


def test_odd_values_do_not_stop_the_report(tmp_path):
    log = RunLog(tmp_path, total_steps=10, config={}, is_main=True, console=False)
    log.step(1, {"loss": float("nan"), "images_per_s": 5.0, "data_wait": float("nan")})
    verification = verify_pairs(make_embeddings(20)[0], np.ones(20, bool))  # no impostors at all: no ROC, no rates
    report.save_evaluation(tmp_path, "initial", {"one-sided": verification}, {"one-sided": IMAGES})
    log.event("evaluation", step=1, tag="initial", name="one-sided", **verification.summary())
    log.close()
    page = Page(report.write_report(tmp_path).read_text())
    assert "n/a" in page.text and "untrained" in page.text


def test_results_of_steps_that_a_resume_has_dropped_are_not_shown(tmp_path):
    make_run(tmp_path, ("clean",))
    RunLog(tmp_path, total_steps=200, config={}, is_main=True, console=False, resume_step=150).close()
    page = Page(report.write_report(tmp_path).read_text())
    assert "step 100" in page.text and f"{100 * result(0.8).accuracy:.2f} ±" not in page.text
    assert f"{100 * result(1.5).accuracy:.2f} ±" in page.text


def test_no_run_is_one_clear_message(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        report.write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_reject_curve_uses_the_weaker_image_of_each_pair():
    verification = result(2.0)
    arrays = {name: getattr(verification, name) for name in ("scores", "same", "norms")}
    arrays["quality"] = -verification.norms
    far = report_plots.reject_far({"x": {"final": arrays}})
    assert far == 1e-1  # 120 impostors: 1e-2 would rest on one false accept
    figure = report_plots.reject_figure({"x": {"final": arrays}})
    weaker = np.minimum(verification.norms[0::2], verification.norms[1::2])
    expected = error_versus_reject(verification.scores, verification.same, weaker, far)[1]
    known = error_versus_reject(
        verification.scores, verification.same, -np.maximum(*verification.norms.reshape(-1, 2).T), far
    )
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), 100 * expected)
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), 100 * known[1])
    assert not np.allclose(expected, known[1])


def test_smoothing_keeps_level_and_skips_gaps():
    values = np.array([1.0, 1.0, np.nan, 1.0, 1.0])
    np.testing.assert_allclose(report_plots.smooth(values, 3), np.ones(5))
    assert np.isnan(report_plots.smooth(np.full(3, np.nan), 3)).all()


def memory_steps(count=9):
    """Step lines of a run with a prototype memory; where nothing was refreshed, there is no cosine."""
    values = {"memory_occupied": 64, "memory_age_mean": 3, "memory_age_max": 9, "cos_y": 0.5, "cos_hardest": 0.3}
    values |= {"quality_q10": 0.2, "quality_q50": 0.6, "quality_q90": 0.9, "fallbacks": 2}
    constant = {"memory_size": 100, "memory_refreshed": 0.25, "loss_lowest_decile": 0.125, "lr": 0.1, "loss": 2.0}
    rows = [{"step": k} | {key: v + k / 100 for key, v in values.items()} | constant for k in range(count)]
    return [row | {"refresh_cos": None if row["step"] < 2 else 0.9} for row in rows]


def curves(figure):
    """{title: (lines of the left axis, lines of the right one)} of the visible panels."""
    shown = [axis for axis in figure.axes if axis.get_visible()]
    rights = {axis.get_position().bounds: axis.lines for axis in shown if not axis.get_title()}
    lefts = [axis for axis in shown if axis.get_title()]
    return {axis.get_title().split(" (")[0]: (axis.lines, rights.get(axis.get_position().bounds)) for axis in lefts}


def test_memory_panels_show_every_value_once():
    steps = memory_steps()
    panels = curves(report_plots.memory_figure(steps))
    lines = {line.get_label(): line.get_data() for left, _ in panels.values() for line in left}
    keys = {
        "in use": "memory_occupied",
        "in all": "memory_size",
        "mean": "memory_age_mean",
        "oldest": "memory_age_max",
        "own": "cos_y",
        "hardest negative": "cos_hardest",
        "90 % quantile": "quality_q90",
        "median": "quality_q50",
        "10 % quantile": "quality_q10",
    }
    for label, key in keys.items():
        np.testing.assert_allclose(lines.pop(label)[1], [row[key] for row in steps])
    x, y = lines.pop("refreshed prototypes")
    assert list(x) == list(range(2, 9)) and set(y) == {0.9}  # the steps without a refresh are left out
    assert set(lines.pop("tenth of lowest quality")[1]) == {12.5} and not lines  # in per cent
    rights = {title: right for title, (_, right) in panels.items() if right}
    assert list(rights) == ["Slots in use", "Loss of the lowest tenth"]
    np.testing.assert_allclose(rights["Slots in use"][0].get_ydata(), 25)
    np.testing.assert_allclose(rights["Loss of the lowest tenth"][0].get_ydata(), [row["fallbacks"] for row in steps])


def test_memory_panels_without_values_are_left_out():
    steps = [{"step": k, "fallbacks": 0, "quality_q10": 0.1, "refresh_cos": None} for k in range(3)]
    figure = report_plots.memory_figure(steps)
    assert list(curves(figure)) == ["Image quality", "Loss of the lowest tenth"]
    assert not figure.axes[0].collections  # no band without its other edge
    assert report_plots.memory_figure(memory_steps()).axes[4].collections


def test_a_memory_has_its_section_and_leaves_the_other_panels(tmp_path, monkeypatch):
    shown = []
    draw_others = report_plots.others_figure
    monkeypatch.setattr(report_plots, "others_figure", lambda steps, names: shown.extend(names) or draw_others(steps, names))
    for name, extra in (("memory", memory_steps()), ("classifier", [{"step": k, "cos_y": 0.5} for k in range(3)])):
        log = RunLog(tmp_path / name, total_steps=10, config={}, is_main=True, console=False)
        for row in extra:
            values = {k: float("nan") if v is None else v for k, v in row.items() if k != "step"}
            log.step(row["step"], values | {"grad_norm": 1.0})
        log.close()
        shown.clear()
        page = Page(report.write_report(tmp_path / name).read_text())
        assert ("Prototype memory" in page.text) == (tmp_path / name / "report/memory.png").exists() == (name == "memory")
        assert shown == (["grad_norm", "memory_gb"] if name == "memory" else ["cos_y", "grad_norm", "memory_gb"])


def test_environment_names_versions_and_hides_secrets(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["protomem", "train", "a.yaml", "log.wandb.api_key=xyz", "seed=1", "name=two words"]
    )
    found = json.loads(json.dumps(report.environment()))
    assert found["command"] == "protomem train a.yaml 'log.wandb.api_key=(hidden)' seed=1 'name=two words'"
    assert found["packages"]["torch"] and found["world_size"] == 1 and found["cpu_cores"] >= 1


def test_commit_is_protomems_own_or_none(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / "protomem"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert environment_module._git_commit(package) is None
    git("init")
    (tmp_path / "theirs").write_text("")
    git("add", "theirs")
    git("commit", "-m", "x")
    assert environment_module._git_commit(package) is None  # somebody's repository, but not protomem's
    git("add", ".")
    git("commit", "-m", "x")
    commit = environment_module._git_commit(package)
    assert re.fullmatch("[0-9a-f]{12}", commit)
    (package / "__init__.py").write_text("changed = 1\n")
    assert environment_module._git_commit(package) == commit + "+"


def test_events_and_steps_are_told_apart(tmp_path):
    make_run(tmp_path, ("clean",))
    assert {r.get("event") for r in read_metrics(tmp_path)} == {None, "evaluation", "checkpoint"}
