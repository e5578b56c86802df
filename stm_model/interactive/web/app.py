"""The page's server, over a workbench; the only file that imports the web framework."""

import ipaddress
import json
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from stm_model.interactive.web.workbench import Refused, TakenElsewhere, Workbench, safe_name

PAGE = Path(__file__).parent / "page"
SCRIPTS = ["page.js", "server.js", "stage.js", "timeline.js"]
PAGE_TYPES = {"page.html": "text/html", "page.css": "text/css", **dict.fromkeys(SCRIPTS, "text/javascript")}
"""The page's files and their media types; no other file is served."""
LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]
"""Host names under which a page is asked for that this machine alone can reach."""
TAB = "x-stm-tab"
"""Header with the tab's name. Pages of other sites cannot send it, so they can change nothing here."""
MAX_JSON = 2**20
"""Bytes of the largest request other than an upload."""
DRAWN = {"frame": int, "object": int, "path": list}
ACTIONS: dict[str, dict[str, type]] = {
    "enter": {"take": bool},
    "leave": {},
    "status": {},
    "scribble": DRAWN,
    "paint": {**DRAWN, "brush": int, "erase": bool},
    "describe": {"object": int, "name": str, "color": str},
    "remove": {"object": int},
    "undo": {},
    "redo": {},
    "run": {},
    "track": {"frame": int, "direction": str},
    "export": {"formats": list},
    "stop": {},
}
"""Method of the workbench → fields of the request, its arguments after the tab; booleans may be left out."""


def make_app(workbench: Workbench, hosts: list[str] | None = None) -> FastAPI:
    """The page and its requests; `hosts` are the host names that requests may use, None allows any."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if hosts is not None:
        # against DNS rebinding: another site's name that resolves to this machine
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    _add_errors(app)
    _add_page(app)
    _add_pictures(app, workbench)
    _add_actions(app, workbench)
    _add_files(app, workbench)
    return app


def serve(workbench: Workbench, listener: socket.socket, ready: Callable[[str], Any]) -> None:
    """Serve the page at a socket that listens until interrupted; `ready` gets the URL once it can be opened."""
    host, port = listener.getsockname()[:2]
    app = make_app(workbench, LOOPBACK if ipaddress.ip_address(host).is_loopback else None)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
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
        # no-cache: browsers ask again, so an upgrade takes effect
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

    @app.get("/stm/certainty")
    def certainty() -> JSONResponse:
        return JSONResponse(workbench.certainty())


def _add_actions(app: FastAPI, workbench: Workbench) -> None:
    @app.post("/stm/do/{action}")
    async def act(action: str, request: Request) -> JSONResponse:
        tab, content = await _asked(request)
        if action not in ACTIONS:
            raise Refused(f"unknown action {action!r}; expected one of {', '.join(ACTIONS)}")
        arguments = [_field(content, name, kind) for name, kind in ACTIONS[action].items()]
        await run_in_threadpool(getattr(workbench, action), tab, *arguments)
        # status waits for the session: not in the event loop, which serves pictures meanwhile
        return JSONResponse(await run_in_threadpool(workbench.status, tab))


def _add_files(app: FastAPI, workbench: Workbench) -> None:
    @app.get("/stm/file/{name}")
    def download(name: str) -> Response:
        path = workbench.saved_session() if name == "session.stm" else workbench.files.get(name)
        if path is None:
            return JSONResponse({"error": f"no file of that name; export first, then {name!r}"}, status_code=404)
        return FileResponse(path, filename=f"{safe_name(workbench.footage.name)}-{name}")

    @app.post("/stm/upload/{kind}")
    async def upload(kind: str, name: str, request: Request, frame: int = 0, label: int = 0) -> JSONResponse:
        tab = _tab(request)
        masks = partial(workbench.give, index=frame, label=label)
        takes: dict[str, Callable[..., None]] = {"session": workbench.restore, "video": workbench.open, "masks": masks}
        if kind not in takes:
            raise Refused(f"upload: expected {', '.join(takes)}, got {kind!r}")
        with workbench.upload(name) as path:
            with path.open("wb") as file:
                async for chunk in request.stream():
                    if file.tell() + len(chunk) > workbench.upload_bytes:
                        raise Refused(f"upload: expected at most {workbench.upload_bytes >> 20} MiB")
                    file.write(chunk)
            await run_in_threadpool(takes[kind], tab, path, name)
        return JSONResponse(await run_in_threadpool(workbench.status, tab))


def _tab(request: Request) -> str:
    tab = request.headers.get(TAB)
    if not tab:
        raise Refused(f"expected the header {TAB}")
    return tab


async def _asked(request: Request) -> tuple[str, dict[str, Any]]:
    """The request's tab and JSON."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON:
            raise Refused(f"request: expected at most {MAX_JSON} bytes")
    try:
        content = await run_in_threadpool(json.loads, body or b"{}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"broken JSON ({error})") from error
    if not isinstance(content, dict):
        raise Refused(f"expected a JSON object, got {type(content).__name__}")
    return _tab(request), content


def _refuse_constant(name: str) -> None:
    # NaN and infinities are not JSON, though Python reads them
    raise ValueError(f"{name} is not JSON")


def _field(content: dict[str, Any], name: str, kind: type) -> Any:
    value = content.get(name, False if kind is bool else None)
    # a bool is an int to Python
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise Refused(f"{name}: expected {kind.__name__}, got {value!r}")
    return value
