"""What the front end adds to loading and unloading: names, and an adapter that nobody uses any more."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest

from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from vllm.entrypoints.serve import create_error_response
from vllm.lora.request import LoRARequest

from icarus.errors import AdapterError, InputError
from icarus.vllm.engine.attached_policy import POLICY
from icarus.vllm.engine.policy import Policy, Verdict
from icarus.vllm.server import loading, names
from icarus.vllm.worker.adapters import REFUSED
from icarus.vllm.worker.identity import ATTRIBUTE, identity


class Client:
    """Engine cores, each with this plugin, or with what it says."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = answers or (identity(),)

    async def call_utility_all_async(self, method: str) -> list[Any]:
        assert method == ATTRIBUTE
        for answer in self.answers:
            if isinstance(answer, Exception):
                raise answer
        return list(self.answers)


def models_of(client: Client, **changes: Any) -> Any:
    return SimpleNamespace(engine_client=SimpleNamespace(engine_core=client), **changes)


class Models:
    """The parts of vLLM's front end that unloading touches; ``original`` is its own ``unload_lora_adapter``."""

    def __init__(self, *, shares: bool) -> None:
        self.lora_requests = {"sql": SimpleNamespace(lora_int_id=7)}
        self.removed: list[int] = []
        self.states: dict[str, Any] = {"base": SimpleNamespace(lora_request=None)}
        self.engine_client = SimpleNamespace(
            output_processor=SimpleNamespace(request_states=self.states), remove_lora=self.remove
        )
        policy = Policy(lambda: pytest.fail("no base model is needed"))
        policy.note(7, Verdict("/nowhere", "fingerprint" if shares else ""))
        self.input_processor = SimpleNamespace()
        POLICY.set(self.input_processor, policy)

    async def remove(self, lora_id: int) -> None:
        self.removed.append(lora_id)

    async def original(self, request: Any) -> str:
        del self.lora_requests[request.lora_name]
        return "done"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "UNLOAD_GRACE_S", 0.0)
    sleep = asyncio.sleep
    monkeypatch.setattr(loading.asyncio, "sleep", lambda seconds: sleep(0))


async def unload(models: Models) -> None:
    released = loading.wrap_unload_lora_adapter(Models.original)
    assert await released(models, SimpleNamespace(lora_name="sql")) == "done"
    for _ in range(5):
        await asyncio.sleep(0)


def test_it_waits_for_the_last_request() -> None:
    async def story() -> None:
        models = Models(shares=True)
        models.states["one"] = SimpleNamespace(lora_request=SimpleNamespace(lora_int_id=7))
        await unload(models)
        assert models.removed == []
        del models.states["one"]
        for _ in range(5):
            await asyncio.sleep(0)
        assert models.removed == [7]
        with pytest.raises(AdapterError, match="unloaded"):
            loading.policy_of(models.input_processor).decide(7, "/nowhere")

    asyncio.run(story())


def test_conventional_adapters_leave_as_well() -> None:
    async def story() -> None:
        models = Models(shares=False)
        await unload(models)
        assert models.removed == [7]

    asyncio.run(story())


def test_what_vllm_cannot_serve_is_the_clients_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(loading, "_check", lambda models, request: None)
    monkeypatch.delenv("ICARUS_ADAPTER_FOLDERS", raising=False)

    def answer(message: str) -> Any:
        async def original(self: Any, request: Any, base_model_name: str | None = None) -> Any:
            return create_error_response(message, "InternalServerError", HTTPStatus.INTERNAL_SERVER_ERROR)

        load = loading.wrap_load_lora_adapter(original)
        return asyncio.run(load(models_of(Client()), SimpleNamespace(lora_name="a", lora_path=str(tmp_path)))).error

    refused = answer(f"Call to add_lora method failed: {REFUSED}it has weights for nothing.")
    assert (refused.code, refused.message) == (400, "it has weights for nothing.")
    assert answer("Call to add_lora method failed: the disk is full").code == 500


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (RuntimeError("Call to icarus_identity method failed"), "runs vLLM without ICaRus"),
        ("icarus-llm 0.0.1 on vLLM 0.1.0", "icarus-llm 0.0.1 on vLLM 0.1.0"),
    ],
)
def test_an_engine_core_with_another_plugin_or_none_gets_no_adapter(
    other: str | Exception, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """One on another node would serve it as plain LoRA."""
    monkeypatch.setattr(loading, "_check", lambda models, request: None)
    monkeypatch.delenv("ICARUS_ADAPTER_FOLDERS", raising=False)

    async def original(*args: Any) -> Any:
        return pytest.fail("vLLM is not asked")

    models = models_of(Client(identity(), other), lora_resolvers=["one"])
    load, resolve = loading.wrap_load_lora_adapter(original), loading.wrap_resolve_lora(original)
    request = SimpleNamespace(lora_name="a", lora_path=str(tmp_path))
    for answer in (asyncio.run(load(models, request)), asyncio.run(resolve(models, "a"))):
        assert answer.error.code == 400
        assert said in answer.error.message


def test_vllm_has_the_client_asked_and_cores_without_the_plugin_answer_themselves() -> None:
    """With an error, before any worker is asked."""
    from vllm.v1.engine import UtilityOutput
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.core_client import AsyncMPClient

    assert AsyncMPClient.call_utility_async
    output, answered = UtilityOutput(1), []
    EngineCoreProc._invoke_utility_method(ATTRIBUTE, lambda: getattr(object(), ATTRIBUTE)(), output, answered.append)
    assert ATTRIBUTE in str(output.failure_message)


# ------------------------------------------------------------------------------------------------- names


def test_names_that_vllm_compares_with_the_types_of_parts() -> None:
    """By asking vLLM itself: an adapter of such a name answers for the base model."""
    from vllm.entrypoints.serve.engine.serving import BaseServing

    def answers(name: str, kind: str) -> bool:
        request = SimpleNamespace(messages=[{"role": "user", "content": [{"type": kind}]}])
        serving: Any = SimpleNamespace(models=SimpleNamespace(lora_requests={name: LoRARequest(name, 1, "/nowhere")}))
        serving._get_message_types = lambda request: BaseServing._get_message_types(serving, request)
        return BaseServing._get_active_default_mm_loras(serving, request) is not None

    parsed, _ = names.vllm_types()
    taken = {kind.split("_")[0] for kind in parsed}
    assert all(answers(kind.split("_")[0], kind) for kind in parsed)
    assert taken <= names.part_types()
    assert {"text", "image", "audio", "video", "input", "input_text", "tool", "thinking"} <= names.part_types()
    for name in names.part_types():
        with pytest.raises(InputError, match="choose another name"):
            names.check_name(name)
    for name in ("sql", "texts", "Text", "my_text"):
        names.check_name(name)
    names.check_name("audio", modalities=["audio"])


@pytest.mark.parametrize(("name", "status"), [("text", 400), ("sql", None)])
def test_a_resolver_brings_no_such_name(name: str, status: int | None) -> None:
    async def original(self: Any, lora_name: str) -> str:
        return f"{lora_name} is resolved"

    resolve = loading.wrap_resolve_lora(original)
    answer = asyncio.run(resolve(models_of(Client(), lora_resolvers=["one"]), name))
    assert (answer.error.code if status else answer) == (status or "sql is resolved")
    assert asyncio.run(resolve(SimpleNamespace(lora_resolvers=[]), "text")) == "text is resolved", "it finds none"


@pytest.mark.parametrize("modalities", [None, {"audio": "/a"}])
def test_loading_under_such_a_name_is_the_clients_error(
    modalities: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ICARUS_ADAPTER_FOLDERS", raising=False)

    async def original(self: Any, request: Any, base_model_name: str | None = None) -> str:
        return pytest.fail("vLLM is not asked")

    config = SimpleNamespace(default_mm_loras=modalities)
    models = SimpleNamespace(
        engine_client=SimpleNamespace(vllm_config=SimpleNamespace(lora_config=config)), lora_requests={}
    )
    load = loading.wrap_load_lora_adapter(original)
    for name in ("audio", "text"):
        answer = asyncio.run(load(models, SimpleNamespace(lora_name=name, lora_path="/nowhere")))
        if modalities and name == "audio":
            assert answer.error.code == 404, "the user gave it for this"
        else:
            assert answer.error.code == 400
            assert f"cannot be named {name!r}" in answer.error.message
