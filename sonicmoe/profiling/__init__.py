"""What a layer's steps spend their time on: torch.profiler's traces as tables, an HTML page and a small file to keep.

Recording (`record`, `script`, `lines`, `annotate`, `peaks`) needs torch; reading and analysing a trace does not.
"""
