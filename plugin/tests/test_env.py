from __future__ import annotations

import os
import string
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blackwell_kernels import env
from blackwell_kernels.errors import EnvironmentSettingError, did_you_mean

FLAGS = [variable for variable in env.REGISTRY if isinstance(variable.default, bool)] + [env.ENABLED]
OPS = [env.DISABLE, env.FORCE]
printable = st.text(string.ascii_letters + string.digits + ",._- ", min_size=1, max_size=30)


@pytest.mark.parametrize("variable", env.REGISTRY, ids=lambda v: v.name)
@pytest.mark.parametrize("text", [None, "", "  "])
def test_absent_and_empty_mean_the_default(monkeypatch, variable, text):
    if text is not None:
        monkeypatch.setenv(variable.name, text)
    assert variable.get() == variable.default


@pytest.mark.parametrize("variable", FLAGS, ids=lambda v: v.name)
@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("0", False), ("TRUE", True), ("off", False), (" yes ", True)]
)
def test_flags(monkeypatch, variable, text, value):
    monkeypatch.setenv(variable.name, text)
    assert variable.get() is value


def test_examples_have_no_deadline():
    assert settings.default.deadline is None  # a busy host needs longer than hypothesis allows by itself


@given(text=printable)
def test_a_flag_is_read_or_refused_with_its_name_and_the_text(text):
    word = text.strip().lower()
    with mock.patch.dict(os.environ, {env.STRICT.name: text}):
        if word in {"1", "true", "yes", "on"}:
            assert env.STRICT.get() is True
        elif word in {"", "0", "false", "no", "off"}:
            assert env.STRICT.get() is False
        else:
            with pytest.raises(EnvironmentSettingError) as caught:
                env.STRICT.get()
            assert str(caught.value).startswith(f"{env.STRICT.name}={text.strip()}: ")
            assert env.problems() == [str(caught.value)]


@given(ops=st.lists(st.sampled_from(list(env.HOOK_OPS))), spaces=st.sampled_from(["", " "]))
def test_a_list_of_operators_is_read_in_any_order(ops, spaces):
    with mock.patch.dict(os.environ, {env.DISABLE.name: f",{spaces}".join(ops)}):
        assert env.DISABLE.get() == frozenset(ops)


@pytest.mark.parametrize("variable", OPS, ids=lambda v: v.name)
def test_all_means_every_operator(monkeypatch, variable):
    monkeypatch.setenv(variable.name, "all")
    assert variable.get() == frozenset(env.HOOK_OPS)


def test_an_unknown_operator_is_refused_with_the_nearest(monkeypatch):
    monkeypatch.setenv(env.DISABLE.name, "moe,gdn_decod")
    with pytest.raises(EnvironmentSettingError, match=r"'gdn_decod'; did you mean 'gdn_decode'\?"):
        env.DISABLE.get()


@given(data=st.data(), variable=st.sampled_from(env.REGISTRY))
def test_a_variable_with_one_letter_missing_is_found_and_named(data, variable):
    cut = data.draw(st.integers(len(env.PREFIX) - 1, len(variable.name) - 1))
    typo = variable.name[:cut] + variable.name[cut + 1 :]
    known = {v.name for v in env.REGISTRY}
    with mock.patch.dict(os.environ, {typo: "1"}):
        messages = env.unknown()
    assert (typo in known) == (not messages)
    if messages:
        assert len(messages) == 1
        assert messages[0].startswith(f"{typo} is set")
        assert did_you_mean(typo, known) in messages[0]


def test_the_nearest_name_is_the_right_one(monkeypatch):
    monkeypatch.setenv("BLACKWELL_KERNELS_STRCT", "1")
    monkeypatch.setenv("BLACKWELL_KERNEL", "1")
    assert env.unknown() == [
        "BLACKWELL_KERNEL is set, but no such variable exists; did you mean 'BLACKWELL_KERNELS'?",
        "BLACKWELL_KERNELS_STRCT is set, but no such variable exists; did you mean 'BLACKWELL_KERNELS_STRICT'?",
    ]


def test_known_variables_are_no_strangers(monkeypatch):
    for variable in env.REGISTRY:
        monkeypatch.setenv(variable.name, "1")
    assert env.unknown() == []


def test_the_table_has_a_row_for_each_variable_and_no_stray_column():
    lines = env.markdown_table().splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == [variable.name for variable in env.REGISTRY]
    assert {line.count("|") for line in lines} == {5}
