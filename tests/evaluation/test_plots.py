import io

import pytest
from matplotlib.figure import Figure
from PIL import Image

from diffusers_perfusion.evaluation import Mean, Sweep, SweepRow
from diffusers_perfusion.evaluation.plots import plot_front


@pytest.fixture
def axes(monkeypatch):
    """The axes of the figure that is saved."""
    seen, savefig = [], Figure.savefig

    def watched(self, *arguments, **options):
        seen.extend(self.axes)
        return savefig(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    return seen


def swept(*rows):
    return Sweep({}, [SweepRow(b, t, Mean(i, i, i), Mean(x, x, x)) for b, t, i, x in rows], [])


def test_a_line_for_each_temperature_with_the_best_ringed(axes):
    png = plot_front(swept((0.5, 0.1, 0.4, 0.2), (0.7, 0.1, 0.3, 0.25), (0.5, 0.2, 0.5, 0.3), (0.7, 0.2, 0.1, 0.35)))
    with Image.open(io.BytesIO(png)) as picture:
        assert (picture.format, picture.size) == ("PNG", (960, 720))
    first, second, ring = axes[0].lines
    assert first.get_xydata().tolist() == [[0.2, 0.4], [0.25, 0.3]]
    assert second.get_xydata().tolist() == [[0.3, 0.5], [0.35, 0.1]]
    assert ring.get_xydata().tolist() == [[0.3, 0.5]]
    assert [text.get_text() for text in axes[0].texts] == ["β 0.5", "β 0.7"] * 2


def test_nothing_is_ringed_where_nothing_is_best(axes):
    plot_front(swept((0.5, 0.1, -0.4, 0.2), (0.7, 0.1, -0.3, 0.25)))
    assert len(axes[0].lines) == 1
