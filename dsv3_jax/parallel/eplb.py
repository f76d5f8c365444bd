"""EPLB: which experts get copies, and on which device each copy lies (report 3.4).

A serving unit holds more physical experts than the model has logical ones: busy experts have
copies, between which their tokens are split evenly. Three steps, each greedy: groups of experts are
packed onto nodes, so that a token that keeps to a few groups keeps to a few nodes; within each node
the experts with the largest share get copies; the copies are packed onto the node's devices.
Hierarchical placement, for prefill, is all three; where groups do not divide among the nodes, and
for decoding over many devices, experts are copied and packed as if there were one node and one
group (global placement).

Plain NumPy. To predict loads, say by a moving average, is left to the caller. Letters: P physical
experts, those of device d from d * P / devices on; C the most copies that an expert has; W rows
that are handled alike and apart (layers, or nodes of layers); I items in M bins.
"""

import numpy as np

from dsv3_jax.config.fields import check


def rebalance_experts(
    load_LE: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_devices: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places `num_replicas` physical experts on devices, layer by layer.

    Args:
        load_LE: tokens of each logical expert, or any measure of its work; 0 or more.
        num_replicas: P, physical experts in all: at least E, a multiple of the devices.
        num_groups: of experts, neighbours of equally many. If they divide among the nodes,
            placement is hierarchical, and all copies of an expert lie on its group's node; else
            global.
        num_nodes: on which equally many devices lie, neighbours.

    Returns:
        physical_to_logical int64 [L, P]; logical_to_physical int64 [L, E, C], each expert's copies
        in the order in which they were made, then -1; replica_count int64 [L, E].

    Of equal loads the first comes first; of equally loaded bins, the lowest. ValueError, one line,
    for loads that are negative, NaN or infinite and for sizes that do not divide.
    """
    load_LE = _checked_loads(load_LE)
    sizes = {"groups": num_groups, "nodes": num_nodes, "devices": num_devices}
    for name, size in sizes.items():
        check(f"number of {name}", size, size >= 1, "1 or more")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check_sizes(load_LE.shape[1], num_replicas, num_groups, num_nodes, num_devices)
    layers, experts = load_LE.shape
    ordered_LE = _pack_groups(load_LE, num_groups, num_nodes)

    # A row is now one node of one layer, its experts counted from 0.
    load_WE = np.take_along_axis(load_LE, ordered_LE, 1)
    load_WE = load_WE.reshape(layers * num_nodes, experts // num_nodes)
    expert_WI, copy_WI, count_WE = _replicate(load_WE, num_replicas // num_nodes)
    share_WI = np.take_along_axis(load_WE / count_WE, expert_WI, 1)
    order_WI = _pack(share_WI, num_devices // num_nodes)
    expert_WI, copy_WI = (np.take_along_axis(x, order_WI, 1) for x in (expert_WI, copy_WI))

    first_1N1 = np.arange(num_nodes)[None, :, None] * (experts // num_nodes)
    place_LNI = expert_WI.reshape(layers, num_nodes, num_replicas // num_nodes) + first_1N1
    place_LP = place_LNI.reshape(layers, num_replicas)
    physical_to_logical_LP = np.take_along_axis(ordered_LE, place_LP, 1)
    replica_count_LE = np.empty((layers, experts), np.int64)
    np.put_along_axis(replica_count_LE, ordered_LE, count_WE.reshape(layers, experts), 1)

    most = replica_count_LE.max(initial=1)
    logical_to_physical_LEC = np.full((layers, experts, most), -1)
    row_L1, copy_LP = np.arange(layers)[:, None], copy_WI.reshape(layers, num_replicas)
    logical_to_physical_LEC[row_L1, physical_to_logical_LP, copy_LP] = np.arange(num_replicas)
    return physical_to_logical_LP, logical_to_physical_LEC, replica_count_LE


def _checked_loads(load_LE: np.ndarray) -> np.ndarray:
    load_LE = np.asarray(load_LE, np.float64)
    if load_LE.ndim != 2 or not load_LE.shape[1]:
        raise ValueError(f"loads have shape {load_LE.shape}; allowed: [layers, experts]")
    wrong = np.argwhere(~(np.isfinite(load_LE) & (load_LE >= 0)))
    if len(wrong):
        layer, expert = wrong[0]
        raise ValueError(
            f"load of expert {expert} in layer {layer} is {load_LE[layer, expert]}; "
            "allowed: finite numbers of 0 or more"
        )
    return load_LE


def _check_sizes(experts: int, replicas: int, groups: int, nodes: int, devices: int) -> None:
    check("number of replicas", replicas, replicas >= experts, f"at least {experts} experts")
    _check_divides("replicas", replicas, "devices", devices)
    _check_divides("experts", experts, "groups", groups)
    _check_divides("devices", devices, "nodes", nodes)


def _check_divides(what: str, number: int, among: str, shares: int) -> None:
    if number % shares:
        raise ValueError(
            f"{number} {what} for {shares} {among}; allowed: a multiple of {shares} {what}"
        )


def _pack_groups(load_LE: np.ndarray, num_groups: int, num_nodes: int) -> np.ndarray:
    """Ids of the experts [L, E], those of the first node's groups first."""
    layers, experts = load_LE.shape
    members_GE = np.arange(experts).reshape(num_groups, -1)
    order_LG = _pack(load_LE[:, members_GE].sum(-1), num_nodes)
    return members_GE[order_LG].reshape(layers, experts)


def _pack(load_WI: np.ndarray, bins: int) -> np.ndarray:
    """Items [W, I] in the order of bins of equally many, in each as they came there.

    The heaviest item goes first, each to the lightest bin that is not full. With one item to a bin
    they stay where they are.
    """
    rows, items = load_WI.shape
    room = items // bins
    if room == 1:
        return np.tile(np.arange(items), (rows, 1))
    order_WI = np.empty((rows, items), np.int64)
    total_WM, filled_WM = np.zeros((rows, bins)), np.zeros((rows, bins), np.int64)
    row_W = np.arange(rows)
    for item_W in np.argsort(-load_WI, axis=1, kind="stable").T:
        bin_W = np.where(filled_WM < room, total_WM, np.inf).argmin(1)
        order_WI[row_W, bin_W * room + filled_WM[row_W, bin_W]] = item_W
        total_WM[row_W, bin_W] += load_WI[row_W, item_W]
        filled_WM[row_W, bin_W] += 1
    return order_WI


def _replicate(load_WE: np.ndarray, copies: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of so many copies in each row the expert and which one of its copies it is [W, copies]; and
    how many each expert has [W, E].

    Each has one; every further copy is of the expert with the largest share. No other choice of
    counts has a smaller largest share.
    """
    rows, experts = load_WE.shape
    expert_WI = np.tile(np.arange(copies), (rows, 1))
    copy_WI = np.zeros_like(expert_WI)
    count_WE = np.ones((rows, experts), np.int64)
    row_W = np.arange(rows)
    for i in range(experts, copies):
        busiest_W = (load_WE / count_WE).argmax(1)
        expert_WI[:, i] = busiest_W
        copy_WI[:, i] = count_WE[row_W, busiest_W]
        count_WE[row_W, busiest_W] += 1
    return expert_WI, copy_WI, count_WE
