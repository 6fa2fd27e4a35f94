"""extras/plot.py draws each picture from the files of the other scripts."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from extras import plot

PNG = b"\x89PNG"


@pytest.fixture
def draw(tmp_path):
    """draw(key=source) draws and returns a dict from each picture's name to the first 4 bytes of the file."""

    def draw(**sources):
        plot.main(plot.Settings(out_dir=str(tmp_path), **sources))
        return {p.name: p.read_bytes()[:4] for p in tmp_path.glob("*.png")}

    return draw


def sweep_table():
    row = {"kind": "float", "weights": "float32", "config": None, "bits_per_weight": 32.0, "bytes": 400}
    table = [row]
    for kind in ("rtn", "qat"):
        for bits in (3, 4):
            config = {"bits": bits, "granularity": "tensor"}
            above = {"above": 0.1 / bits, "above_interval": None}
            above |= {"above_control": 0.1 / bits, "above_control_interval": 0.01}
            table.append(row | above | {"kind": kind, "config": config, "bits_per_weight": float(bits)})
    return table


def test_pictures(draw, tmp_path, workdir, float_run, qat_run):
    (tmp_path / "sweep.json").write_text(json.dumps({"table": sweep_table()}))
    drawn = draw(
        speed=str(ROOT / "results" / "bench.json"),
        sweep=str(tmp_path / "sweep.json"),
        curves=f"{workdir / float_run},{workdir / qat_run}",
        grids=str(workdir / float_run),
    )
    assert drawn == dict.fromkeys(["speed.png", "sweep.png", "curves.png", "grids.png"], PNG)


def test_functions_that_other_scripts_call(tmp_path):
    plot.draw_training([{"step": 1, "loss": 2.0}, {"step": 1, "val_loss": 2.1}], "a run", str(tmp_path / "loss.png"))
    plot.draw_sweep(sweep_table(), str(tmp_path / "table.png"))
    assert {p.name: p.read_bytes()[:4] for p in tmp_path.iterdir()} == {"loss.png": PNG, "table.png": PNG}


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test draws, in a list."""
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    return drawn


@pytest.mark.parametrize(
    "key, name", [("sweep", "sweep_shakespeare_char"), ("sweep", "table_webtext"), ("speed", "bench")]
)
def test_labels_do_not_overlap(draw, figures, key, name):
    draw(**{key: str(ROOT / "results" / f"{name}.json")})
    (figure,) = figures
    figure.canvas.draw()  # to the figure's own resolution
    (ax,) = figure.axes
    texts = [ax.xaxis.label, ax._right_title]
    for axis in (ax.xaxis, ax.yaxis, ax.child_axes[0].yaxis):
        low, high = sorted(axis.get_view_interval())
        texts += [t for at, t in zip(axis.get_ticklocs(), axis.get_ticklabels()) if low <= at <= high]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    assert len(boxes) > 15
    for i, (text, box) in enumerate(boxes):
        assert figure.bbox.padded(1).containsx(box.x0) and figure.bbox.padded(1).containsx(box.x1), text
        for other, other_box in boxes[:i]:
            assert not box.overlaps(other_box), f"{text} and {other}"


def test_zero_is_the_float_model_for_all_methods(figures, tmp_path):
    table = sweep_table()
    for t in table[3:]:
        t["above_control"] = -5.0
    plot.draw_sweep(table, str(tmp_path / "table.png"))
    (ax,) = figures[0].axes
    points = {c.get_label(): sorted(c.lines[0].get_xdata()) for c in ax.containers}
    assert points == dict.fromkeys(["PTQ, nearest level", "QAT"], [0.1 / 4, 0.1 / 3])


def test_names_of_runs(draw, figures, workdir, float_run, qat_run):
    draw(curves=f"our QAT={workdir / qat_run},{workdir / float_run}")
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == ["our QAT", float_run]


def test_curves_are_losses_on_the_text(draw, figures, tmp_path):
    """The loss of a distilled run is that with the float model's predictions, which compares with no other run."""
    (tmp_path / "run").mkdir()
    entries = [{"step": 0, "val_loss": 3.0}, {"step": 4, "loss": 9.0, "text_loss": 2.0}, {"step": 4, "val_loss": 2.5}]
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    draw(curves=str(tmp_path / "run"))
    training, validation = figures[0].axes[0].lines
    assert training.get_xydata().tolist() == [[2, 2]] and validation.get_xydata().tolist() == [[0, 3], [4, 2.5]]


@pytest.mark.parametrize(
    "sources, message",
    [
        ({}, "nothing to draw"),
        ({"curves": "nowhere"}, "there is no nowhere/log.jsonl"),
        ({"speed": str(ROOT / "README.md")}, "README.md is no JSON"),
        ({"speed": str(ROOT / "results" / "demo.json")}, "is not what --speed draws"),
        ({"sweep": str(ROOT / "results" / "bench.json")}, "is not what --sweep draws"),
    ],
)
def test_bad_input(draw, sources, message):
    with pytest.raises(ValueError, match=message):
        draw(**sources)


@pytest.mark.parametrize("key", ["speed", "sweep", "hardware"])
def test_odd_json(draw, tmp_path, key):
    row = {"name": "x", "decode_tok_s": 1, "decode_tok_s_quartiles": [1, 1], "bytes_per_token": 0}  # divides by zero
    table = {"table": [{"config": {}, "kind": "rtn", "above": 10**400, "above_interval": None}]}
    tables = [{"table": t} for t in (None, [], [3], [{}], [{"config": {"bits": 99}}], 7)]
    for content in (None, 3, [], {}, {"rows": 3, "read_gb_s": 1}, {"rows": [row], "read_gb_s": 1}, table, *tables):
        (tmp_path / "odd.json").write_text(json.dumps(content))
        with pytest.raises(ValueError):
            draw(**{key: str(tmp_path / "odd.json")})
    for text in ("[" * 100000, "\udcff"):
        (tmp_path / "odd.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match="odd.json is no JSON"):
            draw(**{key: str(tmp_path / "odd.json")})


def test_missing_layer(draw, workdir, float_run):
    with pytest.raises(ValueError, match="choose among transformer.h.0.mlp.c_fc"):
        draw(grids=str(workdir / float_run), layer="head")
    with pytest.raises(ValueError, match="no matrix in transformer.h.0.ln_1"):
        draw(grids=str(workdir / float_run), layer="transformer.h.0.ln_1")


def test_quantized_model_is_rejected(draw, workdir, qat_run):
    with pytest.raises(ValueError, match="pass the float model"):
        draw(grids=str(workdir / qat_run))


def test_log_of_a_killed_run(draw, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert draw(curves=str(tmp_path / "run"))


def test_backend_of_a_notebook_is_not_needed():
    command = [sys.executable, "-c", "import extras.plot"]
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_of_a_notebook.backend"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
