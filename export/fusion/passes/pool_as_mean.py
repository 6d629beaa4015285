"""Write global average pooling as a mean over height and width: the form every lowering has."""

from __future__ import annotations

from torch import fx

from export.fusion.nodes import args_of, aten, copy_meta, duplicate, is_call


def pool_as_mean(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace adaptive_avg_pool2d(x, 1) by mean(x, (2, 3), keepdim=True); other output sizes stay."""
    graph_module = duplicate(graph_module)
    for node in list(graph_module.graph.nodes):
        if not is_call(node, aten.adaptive_avg_pool2d.default) or any(size != 1 for size in args_of(node)[1]):
            continue
        with graph_module.graph.inserting_before(node):
            new = graph_module.graph.call_function(aten.mean.dim, (args_of(node)[0], [-2, -1], True))
        copy_meta(new, node)
        node.replace_all_uses_with(new)
        graph_module.graph.erase_node(node)
    graph_module.recompile()
    return graph_module
