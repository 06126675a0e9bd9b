"""What takes examples out of the documentation does not lose or pass any."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import docs
from tests.support.docs import Example, examples, matches, run_example

PAGE = """# A page

```python
print("one")
```

```text
one
```

Words.

```console
$ python agent.py
```

```python
# agent.py
def work():
    print("two")
```

```python
import agent

agent.work()
```
"""


def test_what_is_in_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    monkeypatch.setattr(docs, "DOCS", tmp_path)
    one, agent, two = found = examples("page.md")
    assert [str(example) for example in found] == ["page.md:4", "page.md:18", "page.md:24"]
    assert (one.output, agent.output, two.output) == ("one\n", None, None)
    assert [run_example(example, tmp_path) for example in found] == ["one\n", "", "two\n"]


def test_one_that_prints_something_else(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="page:1 printed"):
        run_example(Example("page", 1, "print('this')\n", "that\n"), tmp_path)


@pytest.mark.parametrize("code", ["raise KeyError", "import warnings; warnings.warn('old')"])
def test_one_that_fails(tmp_path: Path, code: str) -> None:
    """A traceback names the line of the page."""
    with pytest.raises(AssertionError, match=r"line 7, in <module>"):
        run_example(Example("page", 7, code, None), tmp_path)


def test_what_dots_stand_for() -> None:
    assert matches("pid …, ok\n", "pid 12, ok\n")
    assert not matches("pid …, ok\n", "pid 12\n, ok\n")
    assert matches("a\n…\nb\n", "a\nb\n")
    assert matches("a\n…\nb\n", "a\n1\n2\nb\n")
    assert not matches("a\n", "a\nb\n")
    assert not matches("a.\n", "ab\n")
