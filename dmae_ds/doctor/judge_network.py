"""Checks of port, addresses and interfaces, from the facts of all nodes. Pure functions, no torch."""

from __future__ import annotations

import ipaddress

from dmae_ds.doctor.check import FAIL, OK, SKIP, WARN, Check, join_names, list_values
from dmae_ds.doctor.judge_machines import Facts, Target, list_errors


def judge_port(facts: Facts, target: Target) -> Check:
    """Check that the master port is free on the first node."""
    first = target.nodes[0].name
    if first not in facts:
        return Check("port", SKIP, f"{first} did not answer")
    if errors := list_errors(facts, "port"):
        return Check("port", FAIL, "; ".join(errors), f"look at {first}")
    busy = facts[first]["port"]["busy"]
    if busy is None:
        return Check("port", OK, f"{target.port} is free on {first}")
    fix = "choose another: --master_port 29501; or end that process, perhaps a run that was left behind"
    return Check("port", FAIL, f"{target.port} is taken on {first} ({busy})", fix)


def judge_master(facts: Facts, meetings: Facts, target: Target) -> Check:
    """Check that every node reaches the first one's port at the address that the launcher will use."""
    first, address = target.nodes[0].name, target.master_address
    if first not in facts:
        return Check("master", SKIP, f"{first} did not answer")
    if not meetings or facts[first].get("port", {}).get("busy"):
        return Check("master", SKIP, "nothing listens there: see port")
    if silent := facts.keys() - meetings.keys():
        fix = "start the doctor again; look at those nodes if it happens again"
        return Check("master", FAIL, f"no second answer from {join_names(sorted(silent))}", fix)
    errors = {
        node: meeting["reached"][address]["error"]
        for node, meeting in meetings.items()
        if "error" in meeting["reached"][address]
    }
    if not errors:
        return Check(
            "master", OK, f"{address}:{target.port} ({first}) is reached from {join_names(meetings)}"
        )
    better = [
        other
        for other in next(iter(meetings.values()))["reached"]
        if all("error" not in meeting["reached"][other] for meeting in meetings.values())
    ]
    if better:
        fix = f"start with --master_addr {better[0]}, which every node reaches"
    elif address is not None and _is_loopback(address):
        fix = f"{first}'s name means {address} there; give --master_addr with the address that others reach"
    else:
        fix = (
            f"open port {target.port} of {first}, and all ports between the nodes, in the firewall; "
            "or give --master_addr"
        )
    return Check("master", FAIL, f"{address}:{target.port} ({first}): {list_values(errors)}", fix)


def judge_interface(facts: Facts, meetings: Facts, target: Target) -> Check:
    """Check which interface gloo or NCCL uses on each node, and that the other nodes reach it there."""
    if errors := list_errors(facts, "network"):
        return Check("interface", FAIL, "; ".join(errors), "look at that node")
    gpus = any(node_facts.get("devices", {}).get("gpus") for node_facts in facts.values())
    variable = "NCCL_SOCKET_IFNAME" if gpus else "GLOO_SOCKET_IFNAME"
    routes = {node: _find_route(node, node_facts, meetings, target) for node, node_facts in facts.items()}
    details = {
        node: _judge_node(node_facts["network"], routes[node], variable, target, gpus=gpus)
        for node, node_facts in facts.items()
    }
    for verdict in (FAIL, WARN):
        bad = {
            node: detail for node, (verdict_of_node, detail) in details.items() if verdict_of_node == verdict
        }
        if bad:
            return Check(
                "interface", verdict, list_values(bad), _fix_interfaces(variable, bad, routes, target)
            )
    return Check("interface", OK, list_values({node: detail for node, (_, detail) in details.items()}))


def _judge_node(
    network: dict, route: str | None, variable: str, target: Target, *, gpus: bool
) -> tuple[str, str]:
    """The verdict and the detail for one node. route: the interface towards the first node."""
    interfaces, value = network["interfaces"], network["asked"][variable]
    if not value and gpus:
        return OK, f"NCCL chooses ({route})"
    if not value:
        # gloo binds to the address that the host's own name resolves to.
        reachable = [address for address in network["own_name"] if not _is_loopback(address)]
        if reachable:
            return OK, find_interface(reachable[0], interfaces) or reachable[0]
        resolved = join_names(network["own_name"]) or "nothing"
        return FAIL, f"the host name resolves to {resolved}, which gloo would give to the others,"
    matching = [interface for interface in interfaces if matches(value, interface, nccl=gpus)]
    if not matching:
        verb = "is" if len(interfaces) == 1 else "are"
        return FAIL, f"{variable}={value}, but there {verb} {join_names(interfaces)}"
    if all(_is_loopback(address) for interface in matching for address in interfaces[interface]):
        return FAIL, f"{variable}={value} is this node's own loopback, which no other node reaches"
    if route is not None and route not in matching:
        return WARN, f"{variable}={value}, but {target.nodes[0].name} is reached over {route}"
    return OK, f"{variable}={value}"


def _fix_interfaces(variable: str, bad: dict[str, str], routes: dict, target: Target) -> str:
    same = len({routes[node] for node in bad}) == 1
    return "; ".join(
        dict.fromkeys(_fix_interface(variable, node, routes[node], target, same=same) for node in bad)
    )


def _fix_interface(variable: str, node: str, route: str | None, target: Target, *, same: bool) -> str:
    if route is None:
        return f"set {variable} on {node} to the interface between the nodes (`ip -brief address` lists them)"
    setting = f"{variable}={route}"
    if target.kind != "pdsh":
        return f"export {setting} on {node}"
    if same:
        return f"echo {setting} >> .deepspeed_env (the launcher exports its lines to every node)"
    return f"{setting} on {node}, in what its shell reads for ssh: the names differ, so not in .deepspeed_env"


def _find_route(node: str, node_facts: dict, meetings: Facts, target: Target) -> str | None:
    """The interface over which a node reaches the first one; there, the one with the master's address."""
    if node == target.nodes[0].name:
        address = target.master_address
    else:
        address = meetings.get(node, {}).get("reached", {}).get(target.master_address, {}).get("from")
    return None if address is None else find_interface(address, node_facts["network"]["interfaces"])


def find_interface(address: str, interfaces: dict[str, list[str]]) -> str | None:
    """The interface that has an address, or None."""
    for name, addresses in interfaces.items():
        if address in [item.partition("%")[0] for item in addresses]:
            return name
    return None


def matches(value: str, interface: str, *, nccl: bool) -> bool:
    """Whether a variable's value selects an interface.

    gloo takes a comma-separated list of names; NCCL takes prefixes, with `=` in front names, with `^` all
    others.
    """
    if not nccl:
        return interface in value.split(",")
    excluded = value.startswith("^")
    value = value.removeprefix("^")
    exact, words = value.startswith("="), value.removeprefix("=").split(",")
    listed = interface in words if exact else any(interface.startswith(word) for word in words)
    return listed != excluded


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
