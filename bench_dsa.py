import sys, os, time
sys.path.insert(0,'tests')
import numpy as np, cupy as cp
from kit.simt_device import Launcher
from kit.sparse_cases import SparseCase, device_step, host_step
from kit import sampling_cases
from mlacli.backends import cuda_sparse, cuda_sampling
from mlacli.backends.cuda_device import CudaDevice
from mlacli.params import SamplingParams
dev=CudaDevice("cuda0", 6<<30); ops=Launcher(dev)
EXTRA={}; _run=ops.run
def run2(name,*a,**k):
    if name.startswith('dsa_scores'): k.update(EXTRA)
    return _run(name,*a,**k)
ops.run=run2
def timed(f, per, reps=5):
    f(); g=dev.capture(f)
    for _ in range(2): g()
    best=[]
    for _ in range(reps):
        a,b=cp.cuda.Event(),cp.cuda.Event()
        a.record(dev.stream); g(); b.record(dev.stream); b.synchronize()
        best.append(cp.cuda.get_elapsed_time(a,b)*1e3/per)
    return float(np.median(best))
rng=np.random.default_rng(0)
def fill(rows):
    x=rng.standard_normal((4096, rows.width),np.float32)
    h=np.tile(x.astype(np.float16),(len(rows.keys)//4096+1,1))[:len(rows.keys)]
    dev.copy_in(rows.keys,h)
L=8
def case(n,n_kv,n_ctx,heads=32,top_k=2048):
    step=device_step(ops, host_step(np.arange(n_kv-n,n_kv),64))
    layers=[cuda_sparse.new_index_rows(dev.take,n_ctx,128,'f16') for _ in range(L)]
    for r in layers: fill(r)
    key,q,w=(ops.put(rng.standard_normal((n,c),np.float32)) for c in (128,heads*128,heads))
    norm,bias=(ops.put(rng.standard_normal(128).astype('f4')) for _ in range(2))
    return step,layers,key,q,w,norm,bias
def tflops(n,n_kv,us): return 2*n*32*128*n_kv/us/1e6
if len(sys.argv)<2 or 'decode' in sys.argv:
  for n_kv in (2049,16384,65536,131072):
    m=dev.mark(); n_ctx=n_kv+64
    step,layers,key,q,w,norm,bias=case(1,n_kv,n_ctx)
    def chain(parts=('index','scores','select')):
        def f():
            for r in layers:
                mm=dev.mark()
                if 'index' in parts: f.q=cuda_sparse.index(ops,r,key,norm,bias,1e-6,step,q,w)
                sc=ops.new((1,cuda_sparse.score_stride(n_ctx)))
                if 'scores' in parts: cuda_sparse._scores(ops,sc,f.q,r,step.pos,0,1)
                ch=ops.new((1,2048),'i4')
                if 'select' in parts:
                    c=f.c
                    ops.run('dsa_select',(c,1),1024,ch,sc,step.pos,2048,sc.shape[1],CLUSTER=c)
                dev.rewind(mm)
        f.c=8; return f
    f=chain(); us={'all':timed(f,L)}
    qs=f.q
    for p in ('index','scores','select'):
        g=chain((p,)); g.q=qs; us[p]=timed(g,L)
    for c in (1,2,4):
        g=chain(('select',)); g.c=c; us[f'select{c}']=timed(g,L)
    for name,extra in (('loose',dict(LOOSE=1)),('tiles4',dict(FEW_TILES=4)),('both',dict(FEW_TILES=4,LOOSE=1))):
        EXTRA.update(extra)
        g=chain(('scores',)); g.q=qs; us['scores '+name]=timed(g,L); EXTRA.clear()
    print(n_kv,{k:round(v,2) for k,v in us.items()},flush=True); dev.rewind(m)
if len(sys.argv)<2 or 'prefill' in sys.argv:
  L=2
  for n,n_kv in ((64,131072),(128,131072),(128,16384),(512,16384),(16,16384)):
    m=dev.mark(); n_ctx=n_kv+64
    step,layers,key,q,w,norm,bias=case(n,n_kv,n_ctx)
    qs=cuda_sparse.index(ops,layers[0],key,norm,bias,1e-6,step,q,w)
    sc=ops.new((n,cuda_sparse.score_stride(n_ctx))); ch=ops.new((n,2048),'i4')
    def sco():
        for r in layers: cuda_sparse._scores(ops,sc,qs,r,step.pos,0,n)
    if qs.slabs:
        us=timed(sco,L); print('wgmma',n,n_kv,round(us,1),'us',round(tflops(n,n_kv,us)),'TF/s',flush=True)
        real=cuda_sparse._has_slabs; cuda_sparse._has_slabs=lambda *a: False
        qs=cuda_sparse.index(ops,layers[0],key,norm,bias,1e-6,step,q,w); cuda_sparse._has_slabs=real
    us=timed(sco,L); EXTRA.update(LOOSE=1); us2=timed(sco,L); EXTRA.clear(); print(round(tflops(n,n_kv,us2)),'loose;','prefill',n,n_kv,'scores us',round(us,1),'TF/s',round(tflops(n,n_kv,us)),flush=True)
    for c in (1,2,4,8):
        def sel():
            for _ in range(2): ops.run('dsa_select',(c,n),1024,ch,sc,step.pos,2048,sc.shape[1],CLUSTER=c)
        print('   select cluster',c,round(timed(sel,2),1),flush=True)
    dev.rewind(m)
if len(sys.argv)<2 or 'sample' in sys.argv:
  for V in (102400,154880):
    for params in (SamplingParams(temp=0,seed=1),SamplingParams(seed=1),SamplingParams(seed=1,top_k=1000)):
        m=dev.mark()
        d=sampling_cases.Driven(ops,params,V); lg=ops.put(sampling_cases.logits_of(rng,V,''))
        def f():
            for _ in range(20): cuda_sampling.next_token(ops,lg,d.state)
        print('sample',V,params.temp,params.top_k,round(timed(f,20),2),flush=True); dev.rewind(m)
