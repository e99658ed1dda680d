"""The pages of rules: the list, the form with its preview, and a rule with what it would have done."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from django.contrib import messages
from django.core.paginator import Paginator
from django.db import IntegrityError
from django.forms import Form
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils import timezone
from django.utils.safestring import mark_safe
from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop as noop
from django.views.decorators.http import require_POST, require_safe

from devices.models import Organization, Variable
from devices.people.preferences import preferences_of
from devices.permissions import Verb, access_of
from devices.units import Units
from pages import organizations
from pages.place import demand, page, row_of
from pages.rules import choices, problems, steps
from pages.rules.choices import Choices
from pages.rules.forms import ChainForm, RuleForm, initial_of
from pages.rules.starters import STARTERS
from pages.rules.steps import StepsForm
from rules.authoring import backtest, describe, editing, lint, validation, when_then
from rules.authoring.sentences import ChainDescriber
from rules.engine.exceptions import InvalidChain
from rules.models import RuleChain, RuleNode

BLANK, STEPS = "blank", "steps"
SHOWN = 50
# Spans of the trial: what it says, and its hours.
SPANS = ((noop("1 day"), 24), (noop("3 days"), 72), (noop("7 days"), 168))


@page
@require_safe
def list_page(request: HttpRequest) -> HttpResponse:
    access = access_of(request)
    known = organizations.known_to(access)
    organization = organizations.chosen(request, known)
    rows, turned = [], None
    if organization is not None:
        chains = RuleChain.objects.filter(organization=organization).select_related("statistics").order_by("name")
        turned = Paginator(chains.prefetch_related("nodes"), SHOWN).get_page(request.GET.get("page"))
        shown = list(turned)
        teller = _teller(request, organization.pk, [node for chain in shown for node in chain.nodes.all()])
        rows = [{"chain": chain, "sentence": describe.sentence_of(chain, chain.nodes.all(), teller)} for chain in shown]
    context = {
        "organizations": known,
        "organization": organization,
        "rows": rows,
        "turned": turned,
        "may_add": organization is not None and access.may("add", "rule-chains", organization.pk),
        "page": "rules",
    }
    return render(request, "pages/rules/list.html", context)


@page
def new_page(request: HttpRequest) -> HttpResponse:
    organization = organizations.demanded(request, "add", "rule-chains")
    wanted = request.GET.get("template", "")
    if not wanted:
        context = {"organization": organization, "starters": STARTERS.values(), "page": "rules"}
        return render(request, "pages/rules/starters.html", context)
    if wanted not in (BLANK, STEPS, *STARTERS):
        raise Http404("There is no such template.")
    offered = _choices(request, organization)
    chain = RuleChain(organization=organization, enabled=False)
    head = {"execution_type": RuleChain.ExecutionType.EVENT_TRIGGERED, "needed": "all"}
    if wanted == STEPS:
        form = StepsForm(offered, chain, data=request.POST or None, initial={"head": head})
        return _edited(request, form, [])
    initial = STARTERS[wanted].initial(offered) if wanted in STARTERS else {"head": head, "when": [{}], "then": [{}]}
    return _edited(request, RuleForm(offered, chain, data=request.POST or None, initial=initial), [])


@page
def edit_page(request: HttpRequest, uuid: UUID) -> HttpResponse:
    chain = _chain(request, uuid, "change")
    nodes = list(chain.nodes.all())
    offered = _choices(request, chain.organization)
    form = _form_of(request, chain, nodes, offered)
    return redirect("admin:rules_rulechain_change", chain.pk) if form is None else _edited(request, form, nodes)


@page
@require_POST
def preview(request: HttpRequest) -> HttpResponse:
    """What the form says so far: sentence, graph, next times, and each problem with its field. Saves nothing."""
    organization = organizations.demanded(request, "add", "rule-chains")
    chain = RuleChain(organization=organization, name=_("New rule"))
    kind = StepsForm if request.GET.get("form") == STEPS else RuleForm
    form = kind(_choices(request, organization), chain, data=request.POST)
    nodes = form.build()
    context: dict[str, Any] = {"problems": form.problems}
    if nodes is not None:
        teller = _teller(request, organization.pk, nodes)
        context |= {
            "sentence": describe.sentence_of(form.chain, nodes, teller),
            "graph": _graph(form.chain, nodes, teller),
            "next_runs": form.next_runs(),
            "warnings": form.in_words(lint.warnings_of(form.chain, nodes)),
        }
    wrong = [
        (field, " ".join(str(error) for error in field.errors))
        for part in form.parts
        if isinstance(part, Form)
        for field in part
        if field.errors
    ]
    context["missing"] = [(field.label, error) for field, error in wrong]
    errors = {field.html_name: error for field, error in wrong}
    return JsonResponse({"html": render_to_string("pages/rules/preview.html", context), "errors": errors})


@page
@require_safe
def rule_page(request: HttpRequest, uuid: UUID) -> HttpResponse:
    chain = _chain(request, uuid, "view")
    nodes = list(chain.nodes.all())
    is_plain = _plain(chain, nodes) is not None
    hours = _hours(request)
    teller = _teller(request, chain.organization_id, nodes)
    context = {
        "chain": chain,
        "organization": chain.organization,
        "sentence": describe.sentence_of(chain, nodes, teller),
        "graph": _graph(chain, nodes, teller),
        "may_change": access_of(request).may("change", "rule-chains", chain.organization_id),
        "is_plain": is_plain,
        "is_editable": is_plain or steps.initial_of(chain, nodes) is not None,
        "spans": SPANS,
        "hours": hours,
        "page": "rules",
    }
    end = timezone.now()
    try:
        context["trial"] = backtest.run(chain, nodes, begin=end - timedelta(hours=hours), end=end, teller=teller)
    except InvalidChain as error:
        context["problems"] = [problems.with_place(each) for each in error.problems]
    context["drawn"] = _drawn(nodes, preferences_of(request).units)
    return render(request, "pages/rules/rule.html", context)


@page
@require_POST
def switch(request: HttpRequest, uuid: UUID) -> HttpResponse:
    chain = _chain(request, uuid, "change")
    try:
        editing.switch(chain, enabled=request.POST.get("enabled") == "yes", by=request.user.get_username())
    except InvalidChain as error:
        why = "; ".join(problems.with_place(each) for each in error.problems)
        messages.error(request, _("It cannot be switched on: {why}").format(why=why))
    return redirect("rule-page", uuid=chain.uuid)


@page
@require_POST
def delete(request: HttpRequest, uuid: UUID) -> HttpResponse:
    chain = _chain(request, uuid, "delete")
    organization, name = chain.organization, chain.name
    editing.delete(chain)
    messages.success(request, _("{name} is deleted.").format(name=name))
    return redirect(f"{reverse('rules-page')}?organization={organization.uuid}")


def _chain(request: HttpRequest, uuid: UUID, verb: Verb) -> RuleChain:
    chain = row_of(request, RuleChain.objects.select_related("organization", "statistics"), "rule-chains", uuid)
    demand(request, verb, "rule-chains", chain.organization_id)
    return chain


def _plain(chain: RuleChain, nodes: list[RuleNode], offered: Choices | None = None) -> dict[str, Any] | None:
    """What the form of when and then shows of a chain; None of one of another shape."""
    shape = when_then.read(nodes)
    return initial_of(chain, shape, offered) if shape else None


def _form_of(request: HttpRequest, chain: RuleChain, nodes: list[RuleNode], offered: Choices) -> ChainForm | None:
    """When and then where the chain has that shape, unless its steps are asked for; None for JSON alone."""
    data = request.POST or None
    initial = None if request.GET.get("form") == STEPS else _plain(chain, nodes, offered)
    if initial is not None:
        return RuleForm(offered, chain, data=data, initial=initial)
    initial = steps.initial_of(chain, nodes, offered)
    return None if initial is None else StepsForm(offered, chain, data=data, initial=initial)


def _edited(request: HttpRequest, form: ChainForm, before: list[RuleNode]) -> HttpResponse:
    """The page of the form, or what follows when it was saved."""
    is_new = form.chain.pk is None
    if request.method != "POST" or not _saved(request, form, before):
        return _form_page(request, form)
    text = _("Saved, and still off. Look at what it would have done, then switch it on.") if is_new else _("Saved.")
    messages.success(request, text)
    return redirect("rule-page", uuid=form.chain.uuid)


def _saved(request: HttpRequest, form: ChainForm, before: list[RuleNode]) -> bool:
    nodes = form.build(before)
    if nodes is None:
        return False
    try:
        editing.save(form.chain, nodes, by=request.user.get_username())
    except IntegrityError:
        form.head.add_error("name", _("is the name of another rule of this farm"))
    except InvalidChain as error:
        form.problems += [problems.with_place(each) for each in error.problems]
    else:
        return True
    return False


def _form_page(request: HttpRequest, form: ChainForm) -> HttpResponse:
    organization = form.chain.organization
    offered = _choices(request, organization)
    context = {
        "form": form,
        "kind": STEPS if isinstance(form, StepsForm) else "",
        "chain": form.chain,
        "organization": organization,
        "page": "rules",
        "offered": {
            "variables": choices.as_json(offered.variables.values()),
            "states": choices.as_json(offered.states.values()),
            "devices": [[key, name] for key, name in offered.devices.items()],
            "operands": choices.operands(),
            "calculations": steps.OPERANDS,
        },
    }
    return render(request, "pages/rules/form.html", context, status=400 if request.method == "POST" else 200)


def _hours(request: HttpRequest) -> int:
    wanted = request.GET.get("hours", "")
    return next((hours for _, hours in SPANS if str(hours) == wanted), SPANS[0][1])


def _drawn(nodes: list[RuleNode], units: Units) -> dict[str, Any] | None:
    """The first number of a sensor that the rule reads: the one that the chart of the trial shows."""
    filters = (node.config for node in nodes if node.type == RuleNode.Type.FILTER)
    for config in filters:
        for _path, leaf in validation.leaves(config, ""):
            if leaf.get("sourceType") == "sensor":
                sensor, name = str(leaf.get("UUID")), str(leaf.get("key"))
                unit = Variable.objects.filter(sensor__uuid=sensor, name=name).values_list("unit", flat=True).first()
                return {"sensor": sensor, "variable": name, "scale": units.scale_of(unit or "")}
    return None


def _graph(chain: RuleChain, nodes: list[RuleNode], teller: ChainDescriber) -> str:
    return mark_safe(describe.graph_of(chain, nodes, teller))  # noqa: S308  rules.authoring.graph escapes every text


def _teller(request: HttpRequest, organization_id: int, nodes: list[RuleNode]) -> ChainDescriber:
    """Speaks the language and the units of the person who asks."""
    return describe.teller_of(organization_id, nodes, units=preferences_of(request).units, say=_)


def _choices(request: HttpRequest, organization: Organization) -> Choices:
    return Choices(organization, preferences_of(request).units)
