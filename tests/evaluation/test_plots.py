import io

import pytest
from matplotlib.figure import Figure
from PIL import Image

from diffusers_perfusion.evaluation.plots import Point, plot_pareto_front


@pytest.fixture
def axes(monkeypatch):
    """The axes of the figure that is saved."""
    seen, savefig = [], Figure.savefig

    def watched(self, *arguments, **options):
        seen.extend(self.axes)
        return savefig(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    return seen


def test_a_line_for_each_label_with_the_best_circled(axes):
    lines = {
        "τ = 0.1": [Point("β 0.5", 0.2, 0.4), Point("β 0.7", 0.25, 0.3)],
        "τ = 0.2": [Point("β 0.5", 0.3, 0.5), Point("β 0.7", 0.35, 0.1)],
    }
    png = plot_pareto_front(lines, Point("best", 0.3, 0.5))
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.size) == ("PNG", (960, 720))
    first, second, circle = axes[0].lines
    assert first.get_xydata().tolist() == [[0.2, 0.4], [0.25, 0.3]]
    assert second.get_xydata().tolist() == [[0.3, 0.5], [0.35, 0.1]]
    assert circle.get_xydata().tolist() == [[0.3, 0.5]]
    assert [line.get_label() for line in axes[0].lines] == ["τ = 0.1", "τ = 0.2", "best"]
    assert [text.get_text() for text in axes[0].texts] == ["β 0.5", "β 0.7"] * 2


def test_without_a_best_there_is_no_circle(axes):
    plot_pareto_front({"τ = 0.1": [Point("β 0.5", 0.2, -0.4), Point("β 0.7", 0.2, -0.3)]}, None)
    assert len(axes[0].lines) == 1
