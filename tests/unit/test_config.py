"""Configuration files: each one shipped loads, the default one tells the truth, and every mistake is named by file and key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from conductor.config import ENVIRONMENT, MAX_WINDOW, Config, ModelConfig, default_file, load_config, parse_config
from conductor.errors import ConfigError
from conductor.types import ContextSpec
from conductor.units import GIB, MIB

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write_yaml(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text, "utf-8")
        return path

    return write_yaml


def options(model: BaseModel, *above: str) -> Iterator[tuple[tuple[str, ...], object]]:
    """(path, value) of every option, sections walked into. Models and their directories are the file's own."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from options(value, *above, name)
        elif (*above, name) not in {("models",), ("model_dirs",)}:
            yield (*above, name), value


def mentioned(document: dict[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    for key, value in document.items():
        if isinstance(value, dict) and key != "models":
            yield from mentioned(value, *above, key)
        elif key not in {"models", "model_dirs"}:
            yield (*above, key)


# --- the files that are shipped ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_loads_and_its_models_lie_where_models_may_be(path: Path) -> None:
    config = load_config(path)
    assert config.source == str(path)
    assert config.models
    for model in config.models.values():
        assert config.resolve(model.path).resolve().parent in config.allowed_directories()
        assert config.resolve(model.path).exists() or (model.repo and model.file), model.path


def test_the_files_are_those_that_the_readme_speaks_of() -> None:
    assert {path.name for path in FILES} >= {"default.yaml", "host.yaml", "8gb.yaml", "three-agents.yaml"}


def test_the_default_file_says_what_the_code_does() -> None:
    assert dict(options(load_config(CONFIGS / "default.yaml"))) == dict(options(Config()))


def test_the_default_file_mentions_every_option_and_no_other() -> None:
    document = yaml.safe_load((CONFIGS / "default.yaml").read_text("utf-8"))
    assert set(mentioned(document)) == {path for path, _ in options(Config())}
    assert {"models", "model_dirs"} <= set(document)


def test_the_default_file_names_every_option_that_a_model_may_override() -> None:
    text = (CONFIGS / "default.yaml").read_text("utf-8")
    models = text[text.index("# Models by key") : text.index("models:\n")]
    assert [name for name in ModelConfig.model_fields if name not in models] == []


# --- what is read -----------------------------------------------------------------------------------------------------


def test_without_a_name_the_environments_file_is_read_and_without_that_the_default(
    monkeypatch: pytest.MonkeyPatch, write: Callable[[str], Path]
) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert load_config().source == str(default_file())
    path = write("live_contexts: 3")
    monkeypatch.setenv(ENVIRONMENT, str(path))
    assert load_config().live_contexts == 3
    assert load_config(CONFIGS / "host.yaml").live_contexts is None


def test_a_configuration_is_taken_as_it_is() -> None:
    config = Config(live_contexts=2)
    assert load_config(config) is config


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "{}"])
def test_an_empty_file_is_all_defaults(write: Callable[[str], Path], text: str) -> None:
    assert dict(options(load_config(write(text)))) == dict(options(Config()))


def test_sizes_are_bytes_or_text(write: Callable[[str], Path]) -> None:
    config = load_config(write("device: {limit: 7.5GiB, host_bytes: 1048576}\nhost_budget: 1 MiB"))
    assert (config.device.limit, config.device.host_bytes, config.host_budget) == (15 * GIB // 2, MIB, MIB)


def test_paths_start_where_the_file_lies(write: Callable[[str], Path]) -> None:
    path = write("models: {m: {path: here/m.gguf}, n: {path: /there/n.gguf}}\nmodel_dirs: [here]")
    config = load_config(path)
    assert config.resolve(config.models["m"].path) == path.parent / "here" / "m.gguf"
    assert config.resolve(config.models["n"].path) == Path("/there/n.gguf")
    assert config.allowed_directories() == ((path.parent / "here").resolve(),)


def test_a_model_overrides_the_defaults_of_contexts_one_by_one(write: Callable[[str], Path]) -> None:
    config = load_config(
        write(
            "context: {window: 4096, n_batch: 256, kv_type: q8_0, context_shift: true}\n"
            "models:\n"
            "  m: {path: m.gguf, window: 100, kv_type: f16, flash_attention: false, context_shift: false}\n"
            "  n: {path: n.gguf}"
        )
    )
    assert config.context_spec("m", 100) == ContextSpec(100, n_batch=256, n_ubatch=256, kv_type="f16", flash_attention=False)
    assert config.context_spec("n", 7) == ContextSpec(7, n_batch=256, n_ubatch=256, kv_type="q8_0", flash_attention=True)
    assert config.context_spec(None, 7) == config.context_spec("n", 7)
    assert [config.window(key, 9999) for key in "mnx"] == [100, 4096, 4096]
    assert [config.context_shift(key) for key in "mnx"] == [False, True, True]


def test_where_nobody_names_a_window_it_is_the_trained_one() -> None:
    assert Config().window("m", 2048) == 2048


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("live_context: 2", "live_context", "unknown option; known here: admission_percent, ageing_s, context"),
        ("device: {kinds: auto}", "device.kinds", "unknown option; known here: host_bytes, index, kind, limit"),
        ("models: {m: {path: m.gguf, windows: 5}}", "models.m.windows", "unknown option"),
        ("1: 2", "1", "unknown option"),
        ("live_contexts: two", "live_contexts", "integer"),
        ("live_contexts: '2'", "live_contexts", "integer"),
        ("live_contexts: 1.0", "live_contexts", "integer"),
        ("live_contexts: true", "live_contexts", "integer"),
        ("live_contexts: 0", "live_contexts", "greater than 0"),
        ("admission_percent: 101", "admission_percent", "less than or equal to 100"),
        ("waitlist_limit: -1", "waitlist_limit", "greater than or equal to 0"),
        ("host_budget: lots", "host_budget", "a size such as 512MiB"),
        ("host_budget: -5", "host_budget", "negative"),
        ("host_budget: null", "host_budget", "a size such as 512MiB"),
        ("device: {limit: 8 pounds}", "device.limit", "a size such as 512MiB"),
        ("device: {kind: tpu}", "device.kind", "'cuda'"),
        ("device: cuda", "device", "object"),
        ("context: {window: 0}", "context.window", "greater than 0"),
        (f"context: {{window: {MAX_WINDOW + 1}}}", "context.window", "less than or equal to"),
        ("context: {kv_type: q5_0}", "context.kv_type", "'q8_0'"),
        ("context: {flash_attention: 1}", "context.flash_attention", "boolean"),
        ("models: {m: {window: 5}}", "models.m.path", "required"),
        ("models: {m: m.gguf}", "models.m", "object"),
        ("models: [m]", "models", "object"),
        ("models: {a/b: {path: m.gguf}}", "models.a/b", "must not look like a path"),
        ("models: {m.gguf: {path: m.gguf}}", "models.m.gguf", "must not look like a path"),
        ("models: {'': {path: m.gguf}}", "models.", "must not look like a path"),
        ("model_dirs: here", "model_dirs", "array"),
        ("ray: {name: 5}", "ray.name", "string"),
    ],
)
def test_a_wrong_option_is_named_with_its_file(write: Callable[[str], Path], text: str, key: str, problem: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert (refused.value.source, refused.value.key) == (str(path), key)
    assert problem in refused.value.problem
    assert str(refused.value).startswith(f"{path}: {key}: ")


@pytest.mark.parametrize(
    ("text", "where", "problem"),
    [
        ("device: {kind: auto", "line 1", "is not valid YAML"),
        ("live_contexts: 1\n\tdevice: 2", "line 2", "is not valid YAML"),
        ("live_contexts: 1\nlive_contexts: 2", "line 2", "'live_contexts' is given twice"),
        ("device:\n  kind: auto\n  kind: cuda", "line 3", "'kind' is given twice"),
        ("models:\n  m: {path: a.gguf}\n  m: {path: b.gguf}", "line 3", "'m' is given twice"),
        ("device: !!python/object:os.system {}", "line 1", "is not valid YAML"),
        ("? [a, b]\n: 1", "line 1", "is not valid YAML"),
        ("- live_contexts", "", "a mapping of options is expected, not list"),
        ("live_contexts", "", "a mapping of options is expected, not str"),
        ("42", "", "a mapping of options is expected, not int"),
        ("live_contexts: .nan", "", "holds a value that no option takes"),
        ("live_contexts: 2024-01-01", "", "holds a value that no option takes"),
        ("models: &m {a: *m}", "", "holds a value that no option takes"),
    ],
)
def test_what_is_no_configuration_at_all_is_refused_with_its_file_and_line(
    write: Callable[[str], Path], text: str, where: str, problem: str
) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert (refused.value.source, refused.value.key) == (str(path), where)
    assert problem in refused.value.problem


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("ray: {name: gpu-é}".encode("latin-1"))
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError) as refused:
            load_config(path)
        assert refused.value.source == str(path)
        assert "cannot be read" in refused.value.problem


def test_a_document_from_elsewhere_is_named_as_its_caller_says(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the test: live_contexts: "):
        parse_config({"live_contexts": 0}, source="the test", directory=tmp_path)
