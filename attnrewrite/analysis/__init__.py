"""Analysis: proofs about a graph, such as the operations on scores or the structure of a mask. Nothing here writes."""
