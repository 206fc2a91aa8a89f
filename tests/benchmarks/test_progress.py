import re
import sys

from dipgo.base.progress import LINES, Progress


def test_bars_show_each_phase_to_its_end_in_a_terminal(capsys, monkeypatch):
    with Progress().phases() as report:
        report("first", 1, 3, "")
    assert capsys.readouterr().err == ""  # a file, in which bars are a nuisance
    monkeypatch.setenv(LINES, "lines")  # as the command line sets it
    with Progress().phases() as report:
        for phase, done in (("first", 0), ("first", 3), ("second", 1)):
            report(phase, done, 3, "figure")
        report("all of it", 0, 0, "takes a minute")
    lines = capsys.readouterr().err.splitlines()
    told = [re.fullmatch(r" *\d+:\d\d  (.*)", line)[1] for line in lines]
    assert told == ["first", "second", "all of it: takes a minute"]
    with Progress(False).phases() as report:
        report("first", 1, 3, "")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert Progress().visible
    assert not Progress(False).visible
    with Progress().phases() as report:
        for done in range(4):
            report("first", done, 3, "")
        report("all of it", 0, 0, "takes a minute")
        report("second", 1, 2, "half")
        report("first", 1, 1, "again")
    shown = capsys.readouterr()
    for text in ("first", "3/3", "1/2", "half", "again", "1/1", "all of it: takes a minute\n"):
        assert text in shown.err
    assert shown.out == ""
