"""Two nodes for each test that asks for them."""

import pytest

from tests.multi_node.nodes import TwoNodes, available


@pytest.fixture
def nodes(tmp_path):
    if reason := available():
        pytest.skip(f"NOTHING RUN OVER TWO NODES: {reason}")
    with TwoNodes(tmp_path) as pair:
        yield pair
