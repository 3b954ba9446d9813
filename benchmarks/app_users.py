"""Somebody who uses the web application, without a browser: presses buttons, uploads pictures, looks at thumbnails."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import httpx

State = dict[str, Any]


class User:
    """One open page.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=120)
        self._session = uuid.uuid4().hex
        page: State = self._client.get("/config").raise_for_status().json()
        self._parts: dict[int, State] = {part["id"]: part for part in page["components"]}
        self._functions: list[State] = page["dependencies"]

    def __enter__(self) -> User:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def press(self, button: str, values: Mapping[str, Any]) -> list[Any]:
        """Presses a button and waits for the answer.

        Args:
            button: its ``elem_id``.
            values: by the label of a component what it holds; the others hold what they begin with.

        Returns:
            What the components of the answer get.

        Raises:
            RuntimeError: if the answer is an error, or there is no such button.
        """
        function = next((one for one in self._functions if self._is_pressed(one, button)), None)
        if function is None:
            raise RuntimeError(f"{button}: the page has no such button")
        data = [self._value(number, values) for number in function["inputs"]]
        asked = {"fn_index": function["id"], "data": data, "session_hash": self._session}
        self._client.post("/gradio_api/queue/join", json=asked).raise_for_status()
        answer = self._answer()
        if not answer["success"]:
            raise RuntimeError(f"{button}: {answer['output']}")
        found: list[Any] = answer["output"]["data"]
        return found

    def upload(self, name: str, content: bytes) -> list[State]:
        """Uploads a picture; what a component for pictures then holds."""
        answer = self._client.post("/gradio_api/upload", files={"files": (name, content)}).raise_for_status()
        file = {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        return [{"image": file, "caption": None}]

    def look(self, address: str) -> int:
        """Fetches a picture; its length in bytes."""
        return len(self._client.get(address).raise_for_status().content)

    def _answer(self) -> State:
        with self._client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self._session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    return dict(message)
        raise RuntimeError("the server ended the answer early")

    def _is_pressed(self, function: State, button: str) -> bool:
        return any(
            event == "click" and self._parts[number]["props"].get("elem_id") == button and function["backend_fn"]
            for number, event in function["targets"]
            if number is not None
        )

    def _value(self, number: int, values: Mapping[str, Any]) -> Any:
        properties = self._parts[number]["props"]
        label = str(properties.get("label") or "")
        return next((value for key, value in values.items() if label.startswith(key)), properties.get("value"))
