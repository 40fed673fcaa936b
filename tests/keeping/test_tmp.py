import sys; sys.path.insert(0,'/work/wt/keep/tests')
from gpuscope import stage
from gpuscope._otel import propagation
def test_a(make_bench):
    bench = make_bench(keep="slower=250ms")
    for i in range(1000):
        with stage("request"):
            with stage("inner"):
                if i % 100 == 7: bench.clock.advance(0.3)
    spans = bench.collect()
    print(len(spans), bench.statistics())
    assert 0
