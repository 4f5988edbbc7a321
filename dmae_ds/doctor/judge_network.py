"""Facts of all nodes -> checks of port, addresses and interfaces. Pure; no torch."""

from __future__ import annotations

import ipaddress

from dmae_ds.doctor.check import FAIL, OK, SKIP, WARN, Check, by_value, names
from dmae_ds.doctor.judge_machines import Asked, Facts, broken


def judge_port(facts: Facts, asked: Asked) -> Check:
    """Free on the first node, where the ranks will meet."""
    first = asked.nodes[0].name
    if first not in facts:
        return Check("port", SKIP, f"{first} did not answer")
    if errors := broken(facts, "port"):
        return Check("port", FAIL, "; ".join(errors), f"look at {first}")
    busy = facts[first]["port"]["busy"]
    if busy is None:
        return Check("port", OK, f"{asked.port} is free on {first}")
    return Check(
        "port",
        FAIL,
        f"{asked.port} is taken on {first} ({busy})",
        "choose another: --master_port 29501; or end that process, perhaps a run that was left behind",
    )


def judge_master(facts: Facts, meetings: Facts, asked: Asked) -> Check:
    """Whether every node reaches the first one's port, at the address that the launcher will use."""
    first = asked.nodes[0].name
    if first not in facts:
        return Check("master", SKIP, f"{first} did not answer")
    if not meetings or facts[first].get("port", {}).get("busy"):
        return Check("master", SKIP, "nobody listens: see port")
    if silent := facts.keys() - meetings.keys():
        return Check(
            "master",
            FAIL,
            f"no second answer from {names(sorted(silent))}",
            "start the doctor again; look at those nodes if it stays so",
        )
    address = asked.master_address
    bad = {
        node: meeting["reached"][address]["error"]
        for node, meeting in meetings.items()
        if "error" in meeting["reached"][address]
    }
    if not bad:
        return Check("master", OK, f"{address}:{asked.port} ({first}) is reached from {names(meetings)}")
    good = [
        other
        for other in next(iter(meetings.values()))["reached"]
        if all("error" not in meeting["reached"][other] for meeting in meetings.values())
    ]
    if good:
        mend = f"start with --master_addr {good[0]}, which every node reaches"
    elif address is not None and _is_loopback(address):
        mend = f"{first}'s name means {address} there; give --master_addr with the address that others see"
    else:
        mend = f"open port {asked.port} of {first}, and all ports between the nodes, in the firewall; or give --master_addr"
    return Check("master", FAIL, f"{address}:{asked.port} ({first}): {by_value(bad)}", mend)


def judge_interface(facts: Facts, meetings: Facts, asked: Asked) -> Check:
    """Which interface the collective library takes on each node, and whether the others can reach it there."""
    if errors := broken(facts, "network"):
        return Check("interface", FAIL, "; ".join(errors), "look at that node")
    gpus = any(part.get("devices", {}).get("gpus") for part in facts.values())
    name = "NCCL_SOCKET_IFNAME" if gpus else "GLOO_SOCKET_IFNAME"
    taken, wrong, loose = {}, {}, {}
    for node, part in facts.items():
        network = part["network"]
        route = _route(node, part, meetings, asked)
        value = network["asked"][name]
        if value:
            fitting = [
                interface for interface in network["interfaces"] if matches(value, interface, nccl=gpus)
            ]
            taken[node] = f"{name}={value}"
            if not fitting:
                wrong[node] = (
                    f"{name}={value}, but there {'is' if len(network['interfaces']) == 1 else 'are'} {names(network['interfaces'])}",
                    route,
                )
            elif all(
                _is_loopback(address) for interface in fitting for address in network["interfaces"][interface]
            ):
                wrong[node] = (
                    f"{name}={value} is this node's own loopback, which no other node reaches",
                    route,
                )
            elif route is not None and route not in fitting:
                loose[node] = f"{name}={value}, but {asked.nodes[0].name} is reached over {route}", route
        elif gpus:
            taken[node] = f"NCCL chooses ({route})"
        else:
            # gloo binds to whatever the host's own name resolves to.
            own = [address for address in network["own_name"] if not _is_loopback(address)]
            if not own:
                wrong[node] = (
                    f"the host name resolves to {names(network['own_name']) or 'nothing'}, which gloo would tell the others,",
                    route,
                )
            else:
                taken[node] = interface_of(own[0], network["interfaces"]) or own[0]
    mend = "; ".join(
        dict.fromkeys(
            _mend(name, node, route, asked, same=len({route for _, route in (wrong or loose).values()}) == 1)
            for node, (_, route) in (wrong or loose).items()
        )
    )
    if wrong:
        return Check("interface", FAIL, by_value({node: text for node, (text, _) in wrong.items()}), mend)
    if loose:
        return Check("interface", WARN, by_value({node: text for node, (text, _) in loose.items()}), mend)
    return Check("interface", OK, by_value(taken))


def _mend(name: str, node: str, route: str | None, asked: Asked, *, same: bool) -> str:
    if route is None:
        return f"set {name} on {node} to the interface between the nodes (`ip -brief address` lists them)"
    value = f"{name}={route}"
    if asked.kind != "pdsh":
        return f"export {value} on {node}"
    if same:
        return f"echo {value} >> .deepspeed_env (the launcher exports its lines to every node)"
    return f"{value} on {node}, in what its shell reads for ssh: the names differ, so not in .deepspeed_env"


def _route(node: str, part: dict, meetings: Facts, asked: Asked) -> str | None:
    """The interface over which a node reaches the first one; on the first, the one with the master's address."""
    if node == asked.nodes[0].name:
        address = asked.master_address
    else:
        address = meetings.get(node, {}).get("reached", {}).get(asked.master_address, {}).get("from")
    return None if address is None else interface_of(address, part["network"]["interfaces"])


def interface_of(address: str, interfaces: dict[str, list[str]]) -> str | None:
    """The interface that has an address."""
    return next(
        (
            name
            for name, addresses in interfaces.items()
            if address in [item.partition("%")[0] for item in addresses]
        ),
        None,
    )


def matches(value: str, interface: str, *, nccl: bool) -> bool:
    """gloo: a comma-separated list of names; NCCL: of prefixes, `=` in front for names, `^` for all others."""
    if not nccl:
        return interface in value.split(",")
    without = value.startswith("^")
    value = value.removeprefix("^")
    exact, parts = value.startswith("="), value.removeprefix("=").split(",")
    found = interface in parts if exact else any(interface.startswith(part) for part in parts)
    return found != without


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
