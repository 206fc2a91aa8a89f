from benchmarks.progress import Bars


def test_bars_show_each_phase_to_its_end(capsys):
    bars = Bars()
    for done in range(4):
        bars("first", done, 3)
    bars("second", 1, 2, "half")
    bars.close()
    shown = capsys.readouterr()
    assert "first" in shown.err
    assert "3/3" in shown.err
    assert "1/2" in shown.err
    assert "half" in shown.err
    assert shown.out == ""
