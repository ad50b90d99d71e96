"""Reports: what is written is what was given, and nothing in it can break a table."""

import numpy as np

from gptlab.evals import report
from gptlab.evals.preference import Interval


def test_show_rounds_for_people():
    assert report.show(0.12345) == "0.123"
    assert report.show(np.float32(2.5)) == "2.500"
    assert report.show(12345.6) == "12,346"
    assert report.show(1234) == "1,234"
    assert report.show(True) == "True"
    assert report.show(None) == report.show(float("nan")) == "-"
    assert report.show(Interval(0.5, 0.41, 0.6)) == "0.500 [0.410, 0.600]"


def test_markdown_cells_cannot_break_the_table():
    table = report.markdown_table(["a", "b"], [["x|y", "two\nlines"]])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y | two lines |"]


def test_text_table_is_aligned():
    table = report.text_table(["name", "value"], [["score", 0.5], ["a longer name", 10.25]])
    lines = table.splitlines()
    assert lines[0].index("value") + 5 == len(lines[2]) == len(lines[3])
    assert lines[3] == "a longer name  10.250"


def test_document_keeps_the_order_of_its_sections():
    text = report.document("Title", {"Second": "b", "First": "a"})
    assert text == "# Title\n\n## Second\n\nb\n\n## First\n\na\n"


def test_plots_are_pngs_and_reproducible(tmp_path):
    curves = {"train": ([1, 2, 3], [3.0, 2.0, 1.0]), "held out": ([1], [2.5])}
    labels = {"title": "Loss", "x_label": "step", "y_label": "loss"}
    report.plot_curves(tmp_path / "a.png", curves, **labels)
    report.plot_curves(tmp_path / "b.png", curves, **labels)
    report.plot_curves(tmp_path / "c.png", {}, markers={"gold": (1.0, 2.0)}, **labels)
    first = (tmp_path / "a.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert first == (tmp_path / "b.png").read_bytes()
    assert first != (tmp_path / "c.png").read_bytes()


def test_intervals_are_drawn_and_names_share_colours(tmp_path, monkeypatch):
    labels = {"title": "Gold", "x_label": "KL", "y_label": "score"}
    drawn = []
    monkeypatch.setattr(report, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    curves = {"round 1, best of n": ([0, 1], [0.1, Interval(0.2, 0.1, 0.4)]), "other": ([0], [1])}
    markers = {"round 1, PPO": (Interval(2.0, 1.0, 2.5), Interval(0.3, 0.2, 0.5))}
    report.plot_curves(tmp_path / "a.png", curves, markers=markers, **labels)
    best, other, ppo = drawn[0].containers
    assert best[0].get_color() == ppo[0].get_color() != other[0].get_color()
    (segments,) = (bars.get_segments() for bars in best[2])
    np.testing.assert_allclose(segments[1][:, 1], [0.1, 0.4])  # from low to high
    horizontal, vertical = (bars.get_segments()[0] for bars in ppo[2])
    np.testing.assert_allclose(horizontal[:, 0], [1.0, 2.5])
    np.testing.assert_allclose(vertical[:, 1], [0.2, 0.5])
    assert len(other[2]) == 0


def test_calibration_plot_of_tables_and_of_none(tmp_path):
    rows = [{"low": 0.5, "high": 0.6, "count": 3, "confidence": 0.55, "accuracy": 0.5}]
    report.plot_calibration(tmp_path / "some.png", {"round 1": rows})
    report.plot_calibration(tmp_path / "none.png", {})
    assert (tmp_path / "some.png").read_bytes() != (tmp_path / "none.png").read_bytes()
