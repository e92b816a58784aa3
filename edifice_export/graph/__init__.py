"""From a torch module to an abstract graph, in which every op of ours is one node: trace, names, translations."""
