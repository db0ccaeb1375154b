"""Reads listings that somebody saved, of a host with fwc or without, and compares a policy with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from fwcompiler.backend import Backend, Saved
from fwcompiler.diagnostics import Report, UsageError
from fwcompiler.foreign import at_present, detect, together
from fwcompiler.pipeline import Compiled, Host, normal_form
from fwcompiler.plan import Plan, make_plan
from fwcompiler.ports import Ports
from fwcompiler.proof.access import AccessChange
from fwcompiler.proof.diagram import StepsExceeded
from fwcompiler.proof.reach import compare_hosts
from fwcompiler.registry import load
from fwcompiler.ruleset import Ruleset
from fwcompiler.source import read_file

READERS = {"nft-json": "nftables", "iptables-save": "iptables-nft"}
"""Which backend reads a form. Both variants of iptables print the same."""
HOW = "save one with `nft -j list ruleset`, or with `iptables-save`, `ip6tables-save` and `ipset save`"
MAX_NOTES = 5


@dataclass(frozen=True, slots=True)
class Listing:
    """What was saved of one host: files by the backend that reads them."""

    parts: tuple[tuple[Backend, tuple[Saved, ...]], ...]

    @property
    def files(self) -> str:
        """The names of the files, as a person would say them."""
        return " and ".join(f"`{each.file}`" for _, saved in self.parts for each in saved)

    def foreign(self, ours: Ruleset | None = None) -> Ruleset:
        """Everybody's rules; ``ours`` stands for those of fwc, an empty ruleset leaves them out.

        Raises:
            UsageError: a file is no listing that can be read.
        """
        found = Ruleset()
        own = self.owner() if ours is not None else None
        for backend, saved in self.parts:
            stand_in = None if ours is None else ours if backend is own else Ruleset()
            try:
                found = together(found, at_present(backend.foreign(saved, stand_in), but=_names(ours)), f"{backend.name}:")
            except ValueError as error:
                raise self._unreadable(saved, error) from error
        return found if ours is None or own else together(ours, found)

    def owner(self) -> Backend | None:
        """The backend in whose form the rules of fwc are in here; None where there are none."""
        return next((backend for backend, _ in self.parts if self.own(backend)), None)

    def own(self, backend: Backend) -> Ruleset:
        """The rules of fwc in one form.

        Raises:
            UsageError: a file is no listing that can be read, or lacks the content of our sets.
        """
        saved = next((saved for each, saved in self.parts if each is backend), ())
        try:
            return backend.own(saved)
        except ValueError as error:
            raise self._unreadable(saved, error) from error

    def versions(self, rules: Ruleset) -> tuple[int, ...]:
        """The address families that are in here. A listing of nft is of both; iptables saves each by itself."""
        if any(backend.set_kind == "nft" for backend, _ in self.parts):
            return (4, 6)
        return tuple(v for v in (4, 6) if any(c.hook and c.hook.version == v for c in rules.chains))

    def _unreadable(self, saved: Sequence[Saved], error: ValueError) -> UsageError:
        names = " and ".join(f"`{each.file}`" for each in saved)
        return UsageError(f"{names} cannot be read as a listing: {error}", hint=HOW)


def _names(ruleset: Ruleset | None) -> frozenset[str]:
    return frozenset(s.name for s in ruleset.sets) if ruleset else frozenset()


def read_listing(files: Sequence[str]) -> Listing | None:
    """The listings in files; None where they are something else, such as a policy.

    Raises:
        UsageError: a file cannot be read, is nft's text, or listings and others are mixed.
    """
    report = Report()
    texts = [(file, read_file(file, report)) for file in files]
    if report.findings:
        raise UsageError(report.findings[0].message)
    found = [(detect(text or ""), Saved(file, text or "")) for file, text in texts]
    for form, each in found:
        if form == "nft-text":
            raise UsageError(f"`{each.file}` is nft's text, which cannot be read", hint=HOW)
    forms = {form for form, _ in found}
    if "policy" in forms:
        if len(found) > 1:
            raise UsageError("listings of one host can be read together, a policy cannot", hint=HOW)
        return None
    found.sort(key=lambda pair: pair[0])
    groups = groupby(found, key=lambda pair: pair[0])
    return Listing(tuple((load(READERS[form]), tuple(each for _, each in same)) for form, same in groups))


def services_of(compiled: Compiled) -> list[tuple[str, Ports]]:
    """The policy's services by their ports."""
    return [(s.name, ports) for s in compiled.resolved.services for ports in s.ports]


def compare_with_listing(compiled: Compiled, host: Host, listing: Listing, *, proof: bool = True) -> Plan:
    """The way to a policy from what a host was saved with.

    Where that holds rules of fwc, they are replaced and everybody else's stay; where it does not, it is another firewall,
    and the policy takes its place.

    Raises:
        UsageError: a file cannot be read as a listing, or holds more than can be decided.
    """
    everything = listing.foreign()
    versions = listing.versions(everything)
    owner = listing.owner()
    own = listing.own(owner) if owner else Ruleset()
    others = listing.foreign(Ruleset())
    wanted = normal_form(compiled, host.backend, proof=proof).ruleset
    same = owner is not None and owner.set_kind == host.backend.set_kind and versions == (4, 6)
    plan = make_plan(host.backend, own, wanted) if same else Plan(own, wanted, (), AccessChange())
    if same and not any(c.rules or (c.hook and c.hook.policy != "accept") for c in others.chains):
        return plan
    after = wanted if owner is None else listing.foreign(wanted) if same else together(wanted, others)
    before = listing.foreign(own) if owner else everything
    try:
        access = compare_hosts(before, after, services_of(compiled), versions)
    except StepsExceeded as error:
        raise UsageError(f"{listing.files} holds more rules than can be compared") from error
    return replace(plan, access=access, of_others=True, notes=tuple(_notes(listing, everything, own, versions, same=same)))


def _notes(listing: Listing, everything: Ruleset, own: Ruleset, versions: Sequence[int], *, same: bool) -> list[str]:
    """What a reader has to know about the comparison."""
    notes = [] if own else [f"{listing.files} holds no rules of fwc: this is what changes when the policy takes their place"]
    notes += [f"it says nothing about IPv{v}, which is not compared: add what `{_SAVES[v]}` prints" for v in (4, 6) if v not in versions]
    if own and not same:
        notes.append("its rules of fwc are in another form: access is compared, kernel changes are not")
    notes += [f"not understood: {what}" for what in everything.others[:MAX_NOTES]]
    more = len(everything.others) - MAX_NOTES
    return [*notes, f"not understood: {more} more"] if more > 0 else notes


_SAVES = {4: "iptables-save", 6: "ip6tables-save"}
