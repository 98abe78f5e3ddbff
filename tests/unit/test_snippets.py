"""Code blocks are found with what is said of them, and those that nobody could run are told."""

from __future__ import annotations

import pytest

from tests.support.snippets import Command, WrongSnippet, blocks, check, commands

PAGE = """\
# Title

Text with `code` and ```` ```sh ```` in it.

```sh
conductor up   # starts it
conductor register big coder \\
  --window 9   # refused, exit code 3

# nothing to do
```

- In a list:

  <!-- snippet: skip needs a moon -->
  ```python
  import ray
  ```

<!-- another comment -->

~~~text
```sh
not a command
```
~~~

<!-- snippet: continues -->

```python
x = 1
```

    indented

```
without
```
"""


def test_blocks_are_found_with_their_lines_and_what_is_said_of_them() -> None:
    found = [(block.line, block.language, block.order, block.reason) for block in blocks(PAGE, "page.md")]
    assert found == [
        (5, "sh", "", ""),
        (16, "python", "skip", "needs a moon"),
        (22, "text", "", ""),
        (30, "python", "continues", ""),
        (34, "", "", ""),
        (36, "", "", ""),
    ]
    assert [block.place for block in blocks(PAGE, "page.md") if block.runs] == ["page.md:5", "page.md:16", "page.md:30"]


def test_commands_are_told_apart_with_their_exit_codes() -> None:
    assert commands(blocks(PAGE, "page.md")[0]) == [
        Command(6, "conductor up   # starts it", 0),
        Command(7, "conductor register big coder --window 9   # refused, exit code 3", 3),
    ]


def test_yaml_that_says_its_name_is_a_file() -> None:
    named, nameless, other = blocks("```yaml\n# a-b.yaml\nx: 1\n```\n```yaml\nx: 1\n```\n```sh\n# c.yaml\n```\n", "page.md")
    assert (named.file, nameless.file, other.file) == ("a-b.yaml", None, None)


@pytest.mark.parametrize(
    "markdown",
    [
        "```sh\nconductor up && \\\n  conductor down\n```\n",
        "```python\nx = 1\n```\n<!-- snippet: continues -->\n```python\nx\n```\n",
        "<!-- snippet: skip needs a moon -->\n```sh\nfly\n```\n",
        '```json\n{"a": ["…"]}\n```\n',
        "```text\n    anything { at $ all\n```\n",
        "```yaml\ndevice: {kind: host}\nmodels: {m: {path: m.gguf}}\n```\n",
        "<!-- snippet: pipeline -->\n```yaml\nagents: {a: {model: m}}\nsteps: {s: {ask: a, prompt: x}}\n```\n",
        "text\n    that goes on\n",
    ],
)
def test_a_block_that_is_what_it_says_passes(markdown: str) -> None:
    check_all(markdown)


@pytest.mark.parametrize(
    ("markdown", "why"),
    [
        ("text\n\n    indented\n", "page.md:3: a block is fenced and says its language"),
        ("```\nx\n```\n", "a block is fenced and says its language"),
        ("```rust\nx\n```\n", "a block is fenced and says its language"),
        ("```sh\n$ conductor up\n```\n", "a command has no prompt"),
        ("```sh\n# nothing\n```\n", "there is no command in it"),
        ("```sh\necho 'open\n```\n", "echo 'open: .*unexpected EOF"),
        ("```python\nprint(\n```\n", "never closed"),
        ('```json\n{"a": 1,}\n```\n', "page.md:1: .*double quotes|Illegal trailing comma"),
        ("```yaml\ndevice: {kinds: host}\n```\n", "device.kinds: unknown option"),
        ("```yaml\nthreads: 1\nthreads: 2\n```\n", "'threads' is given twice"),
        ("<!-- snippet: pipeline -->\n```yaml\nthreads: 1\n```\n", "agents: is missing"),
        ("<!-- snippet: pipeline -->\n```sh\ntrue\n```\n", "'pipeline' is nothing for a block of sh"),
        ("<!-- snippet: continues -->\n```python\nx = 1\n```\n", "there is no Python before it"),
        (
            "<!-- snippet: skip needs a moon -->\n```python\nx = 1\n```\n<!-- snippet: continues -->\n```python\nx\n```\n",
            "there is no Python before it",
        ),
        ("<!-- snippet: skip -->\n```sh\ntrue\n```\n", "skip, and nothing else, has a reason"),
        ("<!-- snippet: continue -->\n```python\nx = 1\n```\n", "'continue' is none of skip, continues, pipeline"),
        ("<!-- snippets skip -->\n```sh\ntrue\n```\n", "is none of skip, continues, pipeline"),
        ("<!-- snippet: skip needs a moon -->\ntext\n\n```sh\ntrue\n```\n", "page.md:1: a block is fenced"),
        ("<!-- snippet: skip needs a moon -->\n", "page.md:1: a block is fenced"),
    ],
)
def test_a_block_that_is_not_what_it_says_is_told_with_its_place(markdown: str, why: str) -> None:
    with pytest.raises(WrongSnippet, match=why):
        check_all(markdown)


def check_all(markdown: str) -> None:
    before = None
    for block in blocks(markdown, "page.md"):
        check(block, before=before)
        before = block if block.language == "python" else before
