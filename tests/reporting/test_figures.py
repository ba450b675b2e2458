"""Labels beside points, and the files of a figure."""

from kd_jax.reporting import figures


def test_a_label_is_written_where_no_other_point_is():
    axes = figures.canvas(5, 4).add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    points = [(0.1, 0.5), (0.15, 0.51), (0.95, 0.9), (0.5, float("nan"))]
    labels = {0: ("covered", "red"), 1: ("free", "red"), 2: ("at the edge", "red"), 3: ("nowhere", "red")}
    assert figures.label_points(axes, points, labels) == [1, 2]
    free, edge = axes.texts
    assert free.get_text() == "free" and free.get_ha() == "left" and edge.get_ha() == "right"


def test_files_of_a_figure_are_the_same_each_time(tmp_path):
    def drawn():
        figure = figures.canvas(2, 2)
        figure.add_subplot().scatter([0, 1], [0, 1])
        return figure

    first, second = (figures.save(drawn(), tmp_path / name, "little") for name in "ab")
    assert first.read_bytes() == second.read_bytes() and first.name == "little.svg"
    assert sorted(path.suffix for path in first.parent.iterdir()) == [".pdf", ".png", ".svg"]
