import pytest
import torch
from oracles import dense_jacobian
from problems import cell_and_input, generator

from timm_deq.jacobian import TransposedJacobian


@pytest.mark.parametrize("name", ["conv", "attention"])
def test_products_against_the_dense_jacobian(name):
    cell, x = cell_and_input(name)
    z, u, v = torch.randn(3, *x.shape, generator=generator(5), dtype=x.dtype)
    J = dense_jacobian(lambda z: cell(z, x), z)
    with torch.no_grad():
        transposed = TransposedJacobian.at(lambda z: cell(z, x), z)
    for _ in range(2):  # the recorded evaluation is kept
        torch.testing.assert_close(transposed(u).flatten(), J.T @ u.flatten())
    assert not transposed(u).requires_grad
    # With a graph, the derivative of <J^T u, v> in u is J v.
    u.requires_grad_()
    (product,) = torch.autograd.grad(transposed(u, create_graph=True), u, v)
    torch.testing.assert_close(product.flatten(), J @ v.flatten())


def test_of_maps_without_a_derivative():
    z, bias = torch.ones(2, 3), torch.ones(3, requires_grad=True)
    assert TransposedJacobian.at(torch.ones_like, z).is_zero
    constant = TransposedJacobian.at(lambda z: bias.expand_as(z), z)
    assert not constant.is_zero and torch.equal(constant(z), torch.zeros(2, 3))
