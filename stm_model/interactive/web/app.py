"""The page in the browser: what it asks for and gets, over a workbench. Alone knows the web framework."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from stm_model.interactive.web.workbench import Refused, TakenElsewhere, Workbench

PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
"""The page's files and their media types; no other file is served."""
TAB = "x-stm-tab"
"""The header by which a tab says which it is. Pages of other sites cannot send it, so they can do nothing here."""
MOST_JSON = 2**20
"""Bytes of the largest request that is no upload."""


def make_app(workbench: Workbench, hosts: list[str] | None = None) -> FastAPI:
    """The page and what it asks for.

    Args:
        workbench: what it works on.
        hosts: the names by which it may be asked for; None allows any.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if hosts is not None:
        # a site elsewhere whose name is made to lead here is not let in
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    _add_errors(app)
    _add_page(app)
    _add_pictures(app, workbench)
    _add_steps(app, workbench)
    _add_files(app, workbench)
    return app


def serve(workbench: Workbench, host: str, port: int, ready: Callable[[str], Any]) -> None:
    """Serve the page until interrupted.

    Args:
        workbench: what it works on.
        host: the address to listen on.
        port: 0 takes a free one.
        ready: called with the page's address once it can be opened.

    Raises:
        OSError: the address cannot be used.
    """
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    address = listener.getsockname()[1]
    loopback = host in ("127.0.0.1", "localhost", "::1")
    app = make_app(workbench, ["127.0.0.1", "localhost", "[::1]"] if loopback else None)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    ready(f"http://{f'[{host}]' if ':' in host else host}:{address}")
    server.run(sockets=[listener])


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ValueError)
    @app.exception_handler(TypeError)
    def refuse(_: Request, error: Exception) -> JSONResponse:
        code = 409 if isinstance(error, TakenElsewhere) else 400
        return JSONResponse({"error": str(error)}, status_code=code)


def _add_page(app: FastAPI) -> None:
    @app.get("/")
    def page() -> Response:
        return file("page.html")

    @app.get("/page/{name}")
    def file(name: str) -> Response:
        if name not in PAGE_TYPES:
            return Response(status_code=404)
        # a browser asks again after an upgrade instead of using what it remembers
        return FileResponse(PAGE / name, media_type=PAGE_TYPES[name], headers={"Cache-Control": "no-cache"})


def _add_pictures(app: FastAPI, workbench: Workbench) -> None:
    @app.get("/stm/frame/{index}")
    def frame(index: int, masks: bool = True) -> Response:
        headers = {"Cache-Control": "private, max-age=3600"}
        return Response(workbench.picture(index, masks), media_type="image/jpeg", headers=headers)

    @app.post("/stm/preview")
    async def preview(request: Request) -> Response:
        tab, content = await _asked(request)
        picture = await run_in_threadpool(workbench.preview, tab, _field(content, "frame", int))
        return Response(picture, media_type="image/jpeg")


def _add_steps(app: FastAPI, workbench: Workbench) -> None:
    def paint(tab: str, content: dict[str, Any]) -> None:
        frame, label, path = _drawn(content)
        workbench.paint(tab, frame, label, path, bool(content.get("erase")))

    actions: dict[str, Callable[[str, dict[str, Any]], Any]] = {
        "enter": lambda tab, content: workbench.enter(tab, bool(content.get("take"))),
        "leave": lambda tab, content: workbench.leave(tab),
        "status": lambda tab, content: None,
        "scribble": lambda tab, content: workbench.scribble(tab, *_drawn(content)),
        "paint": paint,
        "undo": lambda tab, content: workbench.undo(tab),
        "redo": lambda tab, content: workbench.redo(tab),
        "run": lambda tab, content: workbench.run(tab),
        "track": lambda tab, content: workbench.track(
            tab, _field(content, "frame", int), _field(content, "direction", str)
        ),
        "export": lambda tab, content: workbench.export(tab),
        "stop": lambda tab, content: workbench.stop(tab),
    }

    @app.post("/stm/do/{action}")
    async def act(action: str, request: Request) -> JSONResponse:
        tab, content = await _asked(request)
        if action not in actions:
            raise Refused(f"unknown action {action!r}; expected one of {', '.join(actions)}")
        await run_in_threadpool(actions[action], tab, content)
        return JSONResponse(workbench.status(tab))


def _add_files(app: FastAPI, workbench: Workbench) -> None:
    @app.get("/stm/file/{name}")
    def download(name: str) -> Response:
        path = workbench.saved_session() if name == "session.stm" else workbench.files.get(name)
        if path is None:
            return JSONResponse({"error": f"no file of that name; export first, then {name!r}"}, status_code=404)
        return FileResponse(path, filename=workbench.download_name(name))

    @app.post("/stm/upload/{kind}")
    async def upload(kind: str, name: str, request: Request) -> JSONResponse:
        tab = _tab(request)
        take = {"session": workbench.restore, "video": workbench.open}.get(kind)
        if take is None:
            raise Refused(f"upload: expected session or video, got {kind!r}")
        with workbench.upload() as path:
            with path.open("wb") as file:
                async for chunk in request.stream():
                    if file.tell() + len(chunk) > workbench.upload_bytes:
                        raise Refused(f"upload: expected at most {workbench.upload_bytes >> 20} MiB")
                    file.write(chunk)
            await run_in_threadpool(take, tab, path, name)
        return JSONResponse(workbench.status(tab))


def _tab(request: Request) -> str:
    tab = request.headers.get(TAB)
    if not tab:
        raise Refused(f"expected the header {TAB}")
    return tab


async def _asked(request: Request) -> tuple[str, dict[str, Any]]:
    """Which tab asks, and the JSON it sends."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_JSON:
            raise Refused(f"request: expected at most {MOST_JSON} bytes")
    try:
        # NaN and infinity are no JSON, though Python reads them
        content = await run_in_threadpool(_parse, body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"broken JSON ({error})") from error
    if not isinstance(content, dict):
        raise Refused(f"expected a JSON object, got {type(content).__name__}")
    return _tab(request), content


def _parse(body: bytes) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number")

    return json.loads(body or b"{}", parse_constant=refuse)


def _field(content: dict[str, Any], name: str, kind: type) -> Any:
    value = content.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Refused(f"{name}: expected {kind.__name__}, got {value!r}")
    return value


def _drawn(content: dict[str, Any]) -> tuple[int, int, list]:
    """Frame, label and points of a stroke or an outline."""
    return _field(content, "frame", int), _field(content, "object", int), _field(content, "path", list)
