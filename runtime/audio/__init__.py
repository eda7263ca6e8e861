"""Audio files, pipes and arrays to checked float32 mono samples. Knows no bundle and no model.

In data order: decoding.py (bytes to samples, by libsndfile) asks containers.py, streams.py and
old_containers.py whether a file is whole; samples.py checks the samples, has channels.py mix them
to one channel and levels.py note what is wrong with their level. Then, for each window of speech,
conditioning.py undoes clipping (declip.py), an offset and a low level; before windows are cut,
pauses.py leaves long pauses out.
"""
