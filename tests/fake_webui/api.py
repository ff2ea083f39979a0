"""The hosts' own API: when it is on, who may use it, and what becomes of its refusals."""

from secrets import compare_digest

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials


def create_api(webui, app):
    """Adds one of the host's routes, with its authentication as for all of them."""
    passwords = {}
    if webui.cmd_opts.api_auth:
        for auth in webui.cmd_opts.api_auth.split(","):
            user, password = auth.split(":")
            passwords[user] = password
    _answer_refusals(app)

    def check(credentials: HTTPBasicCredentials = Depends(HTTPBasic())):  # noqa: B008
        known = passwords.get(credentials.username)
        if known is None or not compare_digest(credentials.password, known):
            raise HTTPException(401, "Incorrect username or password")

    def sd_models():
        return [{"title": title} for title in webui.checkpoints.checkpoints_list]

    needed = {"dependencies": [Depends(check)]} if webui.cmd_opts.api_auth else {}
    app.add_api_route("/sdapi/v1/sd-models", sd_models, methods=["GET"], **needed)


def api_only(webui):
    """The app with --nowebui."""
    app = FastAPI()
    create_api(webui, app)
    webui.script_callbacks.app_started_callback(None, app)
    return app


def _answer_refusals(app):
    """All errors in one form, and with the status of a refusal."""

    @app.exception_handler(HTTPException)
    async def handle(request: Request, error: HTTPException):
        content = {
            "error": type(error).__name__,
            "detail": vars(error).get("detail", ""),
            "body": vars(error).get("body", ""),
            "errors": str(error),
        }
        return JSONResponse(status_code=error.status_code, content=jsonable_encoder(content))
