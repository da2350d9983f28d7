"""A local page of a plan with a slider: the budget is moved, the plan is solved again, the page is drawn anew. Nothing leaves this machine.

The server holds one plan with its menu and never touches the model: a solve takes a fraction of a second. It answers to 127.0.0.1 and
localhost only, reads nothing from disk for a request and writes nothing.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from finebits.plan.alternatives import POINTS
from finebits.plan.base import Infeasible, Plan
from finebits.plan.footprint import Footprint
from finebits.plan.knapsack import smallest
from finebits.plan.levers import PULLS, variants
from finebits.plan.problem import menu_of
from finebits.plan.solve import again, asked_of
from finebits.report.page import Live, plan_page
from finebits.runfolder import PLAN
from finebits.serve.listen import until_stopped

HOSTS = ["127.0.0.1", "localhost"]
LONGEST = 1 << 20


def app(plan: Plan) -> Starlette:
    """The application: `/` the page, `/solve` the page of another budget, `/plan.json` that plan as a file.

    Each takes `budget` (bytes), `max_length` (tokens a row) and `levers` ("all" or "none" may be pulled, else those that the plan was made
    with). A budget that is too small is answered with status 409 and what could be given up. Raises ValueError if the plan cannot be solved
    again.
    """
    menu = menu_of(plan)
    pulled = bool(plan.sizes["pulls"])

    def limits(max_length: int) -> tuple[int, int]:
        """Budgets from just too small, whatever is pulled, to where nothing would be gained."""
        footprint, levers = Footprint.of(plan), replace(asked_of(plan), max_length=max_length)
        share = 1 - footprint.reserve
        stored, trained = smallest(menu), footprint.least_trained(menu)
        phases = lambda v: footprint.phases(stored, 0, v, trained).values()  # noqa: E731
        low = min(max(footprint.least(menu, v), *phases(v)) for _, v in variants(levers, PULLS))
        return int(0.96 * low / share), int(1.02 * footprint.most(menu, levers) / share)

    def asked(request: Request) -> tuple[int | None, int, str]:
        query = request.query_params
        length = min(max(int(query.get("max_length", plan.levers.max_length)), 2), LONGEST)
        low, high = limits(length)
        wanted = query.get("budget", None if plan.stated else plan.budget or high)
        budget = None if wanted is None else min(max(int(wanted), 1), 1 << 50)
        return budget, length, query.get("levers", "asked")

    def solved(budget: int | None, length: int, levers: str) -> Plan:
        sizes = plan.sizes | ({"all": {"pulls": list(PULLS)}, "none": {"pulls": []}}.get(levers) or {})
        return again(replace(plan, sizes=sizes), budget=budget, pareto=POINTS, max_length=length)

    def page(request: Request) -> Response:
        try:
            budget, length, levers = asked(request)
        except ValueError:
            return JSONResponse({"message": "budget and max_length are whole numbers"}, 400)
        begun = time.perf_counter()
        low, high = limits(length)
        at = budget or plan.budget or high
        live = {"budget": at, "low": min(low, at), "high": max(high, at), "pulled": pulled}
        try:
            solution = solved(budget, length, levers)
            live["budget"] = budget or solution.budget or high
        except Infeasible as e:
            if request.url.path == "/":  # the page itself opens where it fits
                solution = solved(e.smallest, length, levers)
                live["budget"] = e.smallest
            else:
                return JSONResponse({"message": str(e), "smallest": e.smallest, "low": live["low"], "high": live["high"]}, 409)
        milliseconds = 1000 * (time.perf_counter() - begun)
        shown = Live(json.dumps(live), sorted({*LENGTHS, length}), length, pulled, milliseconds)
        return HTMLResponse(plan_page(solution, shown), headers={"Cache-Control": "no-store"})

    def file(request: Request) -> Response:
        try:
            text = json.dumps(solved(*asked(request)).to_json(), indent=1) + "\n"
        except ValueError as e:
            return JSONResponse({"message": str(e)}, 409 if isinstance(e, Infeasible) else 400)
        return Response(text, media_type="application/json", headers={"Content-Disposition": f'attachment; filename="{PLAN}"'})

    routes = [Route("/", page), Route("/solve", page), Route(f"/{PLAN}", file)]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])


LENGTHS = [128, 256, 512, 1024, 2048, 4096, 8192]


def plan_at(path: Path) -> Plan:
    """The plan of a plan.json, or of the run folder that holds one."""
    return Plan.load(path / PLAN if path.is_dir() else path)


def studio(path: Path, port: int) -> None:
    """Serve the page of the plan at `path` until Ctrl-C."""
    until_stopped(app(plan_at(path)), HOSTS[0], port)
