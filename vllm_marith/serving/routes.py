"""The routes under ``/v1/marith``: behind the server's API key like vLLM's own, which guards ``/v1``.

The page at ``/marith/`` holds nothing that needs the key; it asks the person for it and sends it along.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ModelCard, ModelPermission

from vllm_marith.engine.frontend.admission import Admission
from vllm_marith.engine.group import KEY
from vllm_marith.engine.settings import Settings
from vllm_marith.language import Formula, FormulaError, Presets, parse_request
from vllm_marith.language.algebra import parts, simplify
from vllm_marith.language.nodes import Number
from vllm_marith.language.text import to_text
from vllm_marith.plan import lower

from .reload import Reloader

router = APIRouter()

PAGE = Path(__file__).with_name("page.html")
_ONLY_ITSELF = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _admission(request: Request) -> Admission:
    found: Admission = request.app.state.marith_admission
    return found


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    """vLLM's list and, after it, every preset as a child of the base model."""
    served = request.app.state.openai_serving_models
    listed = await served.show_available_models()
    base = served.base_model_paths[0]
    listed.data += [
        ModelCard(
            id=name,
            root=base.model_path,
            parent=base.name,
            max_model_len=served.model_config.max_model_len,
            permission=[ModelPermission()],
        )
        for name in _admission(request).presets.presets
        if name not in served.lora_requests
    ]
    return JSONResponse(listed.model_dump())


@router.get("/v1/marith/formulas")
async def formulas(request: Request) -> JSONResponse:
    """The presets in force."""
    return JSONResponse(_listing(_admission(request).presets))


@router.post("/v1/marith/explain")
async def explain(request: Request) -> JSONResponse:
    """What a formula means, as `marith explain` prints it and as data; HTTP 400 with the error's caret.

    The body is a request's JSON: {"formula": ..., "terms": ..., "normalize": ...}.
    """
    admission = _admission(request)
    try:
        body = (await request.body()).decode()
        if not body.lstrip().startswith("{"):
            raise FormulaError('expected a JSON object such as {"formula": "child - 0.6*adult"}')
        formula = parse_request(body, presets=admission.presets, limits=admission.limits)
        return JSONResponse(explanation(formula))
    except UnicodeDecodeError:
        return _bad_request("the body is not UTF-8")
    except FormulaError as error:
        return _bad_request(str(error), text=error.text, position=error.position)


@router.post("/v1/marith/reload")
async def reload(request: Request) -> JSONResponse:
    """Reads the presets anew; HTTP 400 with the reason leaves the old ones in force."""
    reloader: Reloader = request.app.state.marith_reloader
    try:
        return JSONResponse(_listing(reloader.reload_all()))
    except ValueError as error:
        folders = Settings.of(request.app.state.engine_client.vllm_config).presets
        return _bad_request(f"{without_folders(str(error), folders)}; the presets stay as they are")


def without_folders(sentence: str, folders: Sequence[Path]) -> str:
    """The sentence without the way to the presets' folders: where they lie is no client's business.

    Files of several folders keep the folder's own name, to be told apart.
    """
    for folder in sorted(folders, key=lambda folder: len(str(folder)), reverse=True):
        path = rf"(?<![\w./-]){re.escape(str(folder))}"
        sentence = re.sub(f"{path}/", f"{folder.name}/" if len(folders) > 1 else "", sentence)
        sentence = re.sub(rf"{path}(?![\w./-])", folder.name, sentence)
    return sentence


@router.get("/marith/", include_in_schema=False)
@router.get("/marith", include_in_schema=False)
async def page() -> HTMLResponse:
    """One file, which loads nothing from anywhere."""
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": _ONLY_ITSELF})


def explanation(formula: Formula) -> dict[str, Any]:
    """A checked formula's text, weights, terms and program as JSON data."""
    plan = lower(formula)
    return {
        "text": formula.explain(),
        "formula": str(formula),
        "normalize": formula.normalize,
        "leader": formula.leader,
        "linear": all(stage.linear for stage in plan.stages),
        "weight": list(plan.weight),
        "summands": [
            {"weight": weight, "of": to_text(base)}
            for weight, base in parts(simplify(formula.root))
            if not isinstance(base, Number)
        ],
        "terms": {name: term.to_dict() for name, term in formula.terms.items()},
        "rows": len(plan.terms),
        "stages": [
            {
                "kind": stage.kind,
                "program": [
                    {"op": op, "row": row, "weight": weight} for op, row, weight in stage.instructions
                ],
                "sources": stage.sources,
                "parameters": stage.parameters,
            }
            for stage in plan.stages
        ],
    }


def _listing(presets: Presets) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [
            {
                "name": preset.name,
                "formula": preset.text,
                "parameters": preset.parameters,
                "parsed": str(preset.formula),
                "normalize": preset.formula.normalize,
                "terms": {name: term.to_dict() for name, term in preset.formula.terms.items()},
                "description": preset.description,
                "paper": preset.paper,
                "speculative": preset.speculative,
            }
            for preset in presets.presets.values()
        ],
    }


def _bad_request(sentence: str, **place: Any) -> JSONResponse:
    """vLLM's form of an error, with the place in the formula where there is one."""
    error = ErrorInfo(message=f"marith: {sentence}", type="BadRequestError", param=KEY, code=400)
    known = {key: value for key, value in place.items() if value is not None}
    return JSONResponse({"error": error.model_dump() | known}, status_code=400)
