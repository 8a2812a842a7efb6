"""Plans over servers that are reached by an API: a thought shared by two models, or left before its end.

What the local engine does token by token within one process is done here step by step, over calls that go on from the
thought so far (`gateway.upstream.begun`). Each of them is an attempt of the request, held for and billed by itself.
"""
