"""`--plugin` on vLLM's real parser. Each case runs in a forked child, so that what it patches dies with it."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

from blackwell_kernels import activation, flag

arg_utils = pytest.importorskip("vllm.engine.arg_utils")
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402


def parse(*arguments: str, **variables: str) -> dict:
    """Build vLLM's parser as `vllm serve` does, parse, and tell what came of it."""
    import vllm.plugins

    from blackwell_kernels import model_patches

    os.environ.update(variables)
    calls: list[int] = []
    model_patches.activate = lambda: calls.append(1)  # type: ignore[attr-defined]
    vllm.plugins.plugins_loaded = False
    parser = arg_utils.AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    namespace = parser.parse_args(list(arguments))
    return {
        "plugin": namespace.plugin,
        "model": namespace.model,
        "activated": len(calls),
        "BLACKWELL_KERNELS": os.environ.get("BLACKWELL_KERNELS"),
        "VLLM_PLUGINS": os.environ.get("VLLM_PLUGINS"),
    }


def test_without_the_flag_nothing_happens(forked):
    found = forked(lambda: parse("--model", "m"))
    assert found == {"plugin": None, "model": "m", "activated": 0, "BLACKWELL_KERNELS": None, "VLLM_PLUGINS": None}


@pytest.mark.parametrize(
    "arguments",
    [("--plugin", "blackwell_kernels"), ("--plugin=blackwell_kernels",), ("--plugin", "blackwell_kernels,")],
)
def test_the_flag_activates_and_children_inherit(forked, arguments):
    found = forked(lambda: parse(*arguments, "--model", "m"))
    assert found == {
        "plugin": ["blackwell_kernels"],
        "model": "m",
        "activated": 1,
        "BLACKWELL_KERNELS": "1",
        "VLLM_PLUGINS": None,
    }


def test_engine_arguments_are_made_from_such_a_namespace(forked):
    def engine_arguments():
        parser = arg_utils.AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        namespace = parser.parse_args(["--plugin", "lora_filesystem_resolver", "--model", "m"])
        return arg_utils.AsyncEngineArgs.from_cli_args(namespace).model

    assert forked(lambda: [parse("--model", "m"), engine_arguments()][1]) == "m"


def test_it_repeats_takes_lists_and_activates_once(forked):
    found = forked(
        lambda: parse("--plugin", "lora_filesystem_resolver,blackwell_kernels", "--plugin", "blackwell_kernels")
    )
    assert found["plugin"] == ["lora_filesystem_resolver", "blackwell_kernels"]
    assert found["activated"] == 1


@pytest.mark.parametrize(
    ("allowed", "expected", "activated"),
    [("blackwell_kernels", "blackwell_kernels", 1), ("other,blackwell_kernels", "other,blackwell_kernels", 1)],
)
def test_an_allow_list_with_us_stays_as_it_is(forked, allowed, expected, activated):
    found = forked(lambda: parse("--plugin", "blackwell_kernels", VLLM_PLUGINS=allowed))
    assert (found["VLLM_PLUGINS"], found["activated"]) == (expected, activated)


def test_an_allow_list_grows_by_another_plugin_that_is_loaded_at_once(forked):
    def parse_with_spy():
        from vllm.plugins.lora_resolvers import filesystem_resolver

        loaded = []
        filesystem_resolver.register_filesystem_resolver = lambda: loaded.append(1)
        found = parse("--plugin", "lora_filesystem_resolver", VLLM_PLUGINS="blackwell_kernels")
        return {**found, "loaded": len(loaded)}

    found = forked(parse_with_spy)
    assert found["VLLM_PLUGINS"] == "blackwell_kernels,lora_filesystem_resolver"
    assert found["loaded"] == 1


def test_without_our_name_in_the_allow_list_the_flag_does_not_exist(forked):
    found = forked(lambda: parse("--plugin", "blackwell_kernels", VLLM_PLUGINS="other"))
    assert found["exit"] == 2
    assert "--plugin" in found["stderr"]


def test_an_unknown_name_ends_parsing_with_the_nearest(forked):
    found = forked(lambda: parse("--plugin", "blackwell-kernels"))
    assert found["exit"] == 2
    assert "no installed plugin is named 'blackwell-kernels'; did you mean 'blackwell_kernels'?" in found["stderr"]
    assert "lora_filesystem_resolver" in found["stderr"]


@pytest.mark.parametrize("value", ["", ","])
def test_an_empty_name_is_refused(forked, value):
    found = forked(lambda: parse("--plugin", value))
    assert found["exit"] == 2
    assert "--plugin needs the name of a plugin" in found["stderr"]


def test_it_contradicts_an_explicit_off(forked):
    found = forked(lambda: parse("--plugin", "blackwell_kernels", BLACKWELL_KERNELS="0"))
    assert found["exit"] == 2
    assert "contradicts BLACKWELL_KERNELS=0" in found["stderr"]


def test_too_old_a_vllm_ends_parsing_with_what_to_do(forked, monkeypatch):
    monkeypatch.setattr(activation, "vllm_version", lambda: "0.20.2")
    found = forked(lambda: parse("--plugin", "blackwell_kernels"))
    assert found["exit"] == 2
    assert "it needs 0.24 or newer" in " ".join(found["stderr"].split())


def test_a_yaml_configuration_reaches_it(forked, tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("plugin: blackwell_kernels\nmodel: m\n")
    found = forked(lambda: parse("--config", str(path)))
    assert (found["plugin"], found["activated"], found["model"]) == (["blackwell_kernels"], 1, "m")


def test_an_unknown_vllm_is_left_as_it_is(caplog):
    flag._wrap(ModuleType("arg_utils"))
    assert "no --plugin: use BLACKWELL_KERNELS=1" in caplog.text


def test_rays_workers_get_the_variables(forked):
    def copied():
        parse("--plugin", "blackwell_kernels", VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY="OTHER_", OTHER_ONE="1")
        from vllm.ray.ray_env import get_env_vars_to_copy

        return sorted(name for name in get_env_vars_to_copy() if name.startswith(("BLACKWELL", "OTHER")))

    assert forked(copied) == [
        "BLACKWELL_KERNELS",
        "BLACKWELL_KERNELS_RUN",
        "BLACKWELL_KERNELS_STATUS_DIR",
        "OTHER_ONE",
    ]


def test_a_flag_of_vllms_own_is_left_alone(forked):
    def own():
        def stock(parser):
            parser.add_argument("--plugin", default="vllm's")
            return parser

        class Module:
            class EngineArgs:
                add_cli_args = staticmethod(stock)

        flag._wrap(Module)  # type: ignore[arg-type]
        flag._wrap(Module)  # type: ignore[arg-type]
        return Module.EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args([]).plugin

    assert forked(own) == "vllm's"
