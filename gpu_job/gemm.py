import sys, time, os
sys.path.insert(0, 'tests')
import numpy as np, cupy as cp
t00=time.time()
from mlacli.backends.cuda_device import CudaDevice
from mlacli.backends.cuda_array import Array
from mlacli.backends import cuda_gemm as gemm
from mlacli.backends.cuda_acts import Chosen
from mlacli.backends.cuda_weights import CudaWeight
from mlacli.loading.tiles import tiled_shape
from kit import gemm_cases as cases
from kit.simt_device import Launcher
from kit.tiled import qtype_of
dev=CudaDevice('cuda0', 6<<30); ops=Launcher(dev)
print(cp.cuda.runtime.getDeviceProperties(0)['name'], dev.n_sm, dev.capability)
T13=["F16","BF16","Q4_0","Q4_1","Q5_0","Q5_1","Q8_0","IQ4_NL","MXFP4","Q4_K","Q5_K","Q6_K","IQ4_XS"]
old_width=gemm._width
def jobs():
    for i,t in enumerate(T13):
        k=t in ("Q4_K","Q5_K","Q6_K","IQ4_XS")
        yield (32,64,96,128)[i%4], cases.dense, (ops,(t,),(300,),(288 if k else 200),(9,33,64,100,513)[i%5],32 if k else 0,i)
    yield 128, cases.dense, (ops,("Q4_K","Q8_0","F16"),(520,300,70),512,200,0,20)
    yield 64, cases.per_head, (ops,"Q8_0",5,72,192,70,21)
    yield 128, cases.swiglu, (ops,("Q4_K","Q6_K"),300,512,200,22)
    yield 128, cases.routed, (ops,("Q4_K","Q4_K","Q5_0"),513,6,16,512,352,23)
    yield 128, cases.routed, (ops,("Q6_K","Q6_K","Q8_0"),100,3,9,256,96,24,(2,5),True)
    yield 128, cases.rows, (ops,33,2048,25)
    yield 128, cases.scores, (ops,100,70,2048,26)
def use(w): gemm._width=(lambda *a:w)
m=dev.mark()
dev.launch_real=dev.launch
t0=time.time()
with dev.prepared():
    for w,f,a in jobs():
        use(w); dev.rewind(m)
        with np.errstate(all='ignore'): list(f(*a))
print('compile', round(time.time()-t0,1), 's', dev.kernels.n_compiled)
bad=0
for w,f,a in jobs():
    use(w); dev.rewind(m)
    try:
        with np.errstate(all='ignore'):
            for c,near,far,where in f(*a):
                lim=1e-8 if ('gated' in c or 'experts' in c or 'half' in c) else 1e-10
                ok=near<=lim and far<=1e-6; bad+=not ok
                print('ok ' if ok else 'BAD', w, c, f'{near:.1e} {far:.1e}', '' if ok else where)
    except Exception as e:
        print('EXC',w,f.__name__,repr(e)[:300]); bad+=1
    sys.stdout.flush()
for s in range(3):
    dev.rewind(m)
    try: cases.sorting(ops,300,6,20,3,11,s); cases.sorting(ops,2048,6,64,0,64,s)
    except AssertionError as e: print('BAD sorting',repr(e)[:200]); bad+=1
print('bad',bad, round(time.time()-t00,1),'s')
if len(sys.argv)>1: sys.exit()
# ---- timings
gemm._width=old_width
rs=cp.random.RandomState(1)
def rnd(name,shape):
    q=qtype_of(name); lay=tiled_shape(shape,q,0)
    a=dev.take((lay.nbytes,),'u1')
    v=cp.ndarray((lay.nbytes,),cp.uint8,cp.cuda.MemoryPointer(cp.cuda.UnownedMemory(a.ptr,lay.nbytes,None),0))
    CH=1<<26
    for i in range(0,lay.nbytes,CH):
        n=min(CH,lay.nbytes-i); v[i:i+n]=rs.randint(0,256,n,dtype=cp.uint8)
    # scales: small normal f16 (0x1xxx..): mask exponents so nothing is inf or nan
    for p in 'smd':
        at,nb=lay.planes[p]
        if nb and not (p=='s' and lay.planes['d'][1]):
            w=v[at:at+nb].view(cp.uint16); w[...]=(w&0x0fff)|0x1000
    if name in('F16','BF16'):
        w=v[256:].view(cp.uint16); w[...]=(w&0x83ff)|(0x2c00 if name=='F16' else 0x3c00)
    v[:4]=cp.asarray(np.array([8.0],np.float32).view(np.uint8))
    cp.cuda.Device().synchronize()
    return CudaWeight(name,shape,q,a,lay)
def x16(n,d): return cases.put16(ops,np.random.default_rng(0).standard_normal((n,d),np.float32))
def timed(label,fn,flops=0,nbytes=0,reps=5,graphs=6):
    mk=dev.mark()
    def once():
        dev.rewind(mk); fn()
    try:
        with dev.prepared(): once()
        once(); dev.synchronize()
        g=dev.capture(lambda:[once() for _ in range(reps)])
        g(); dev.synchronize()
        best=1e9
        for _ in range(graphs):
            a,b=cp.cuda.Event(),cp.cuda.Event()
            a.record(dev.stream); g(); b.record(dev.stream); b.synchronize()
            best=min(best,cp.cuda.get_elapsed_time(a,b)/reps*1e3)
        print(f'{label:44s} {best:8.2f} us', f'{flops/best/1e6:6.0f} TF/s' if flops else '', f'{nbytes/best/1e6:5.2f} TB/s' if nbytes else '')
        sys.stdout.flush(); dev.rewind(mk); return best
    except Exception as e: print('EXC',label,repr(e)[:300])
    dev.rewind(mk); return 0
d=2048
W={}
for key,(t,s) in dict(q=("Q4_K",(3072,d)),kva=("Q4_K",(576,d)),kva8=("Q8_0",(576,d)),o=("Q4_K",(2048,2048)),sg=("Q4_K",(2816,d)),su=("Q4_K",(2816,d)),sd=("Q6_K",(d,2816)),
   eg=("Q4_K",(64,1408,d)),eu=("Q4_K",(64,1408,d)),ed5=("Q5_0",(64,d,1408)),ed8=("Q8_0",(64,d,1408)),o6=("Q6_K",(2048,2048)),o8=("Q8_0",(2048,2048)),of=("F16",(2048,2048))).items():
    W[key]=rnd(t,s)
gate=cases.plain(ops,np.random.default_rng(0).standard_normal((64,d)).astype('f4'))
nw=cases.plain(ops,np.ones(d,'f4'))
base=dev.mark()
for n in (2048,512,64):
    dev.rewind(base); print('--- n',n)
    x=x16(n,d); h=x16(n,2816); xf=ops.put(np.random.default_rng(0).standard_normal((n,d),np.float32))
    res=ops.put(np.zeros((n,d),'f4')); yq=ops.new((n,3072)); yk=ops.new((n,576))
    tot=0
    F=lambda o,i:2.*n*o*i
    tot+=timed('q+kv_a Q4_K',lambda:gemm.products(ops,[(W['q'],yq),(W['kva'],yk)],x),F(3648,d))
    timed('q+kv_a Q4_K+Q8_0',lambda:gemm.products(ops,[(W['q'],yq),(W['kva8'],yk)],x),F(3648,d))
    tot+=timed('o Q4_K add',lambda:gemm.products(ops,[(W['o'],res)],x,add=True),F(d,2048))
    y16=gemm.rows16(ops,n,2048)
    timed('o Q4_K store',lambda:gemm.products(ops,[(W['o'],res)],x),F(d,2048))
    timed('o Q4_K half',lambda:gemm.products(ops,[(W['o'],y16)],x),F(d,2048))
    for t in ('o6','o8','of'): timed('o '+W[t].qtype.name,lambda:gemm.products(ops,[(W[t],res)],x),F(d,2048))
    if n==512:
        for w in (32,64,96,128):
            use(w); timed(f'q+kv_a width {w}',lambda:gemm.products(ops,[(W['q'],yq),(W['kva'],yk)],x),F(3648,d))
        gemm._width=old_width
    tot+=timed('shared gated Q4_K',lambda:gemm.gated(ops,W['sg'],W['su'],x),F(5632,d))
    tot+=timed('shared down Q6_K add',lambda:gemm.products(ops,[(W['sd'],res)],h,add=True),F(d,2816))
    rng=np.random.default_rng(1)
    ids=np.argsort(rng.random((n,64)),axis=1)[:,:6].astype(np.int32)
    ch=Chosen(ops.put(ids),ops.put(np.ones((n,6),'f4')))
    tot+=timed('sort',lambda:gemm.sort(ops,ch.ids,0,64))
    order=gemm.sort(ops,ch.ids,0,64)
    EF=2.*n*6*3*1408*d
    orig=gemm.sort; gemm.sort=lambda *a:order
    run=ops.run
    for only in ('gemm_experts_up','gemm_experts_down','moe_combine'):
        ops.run=lambda name,*a,only=only,**k: run(name,*a,**k) if name==only else None
        fl=EF*2/3 if only.endswith('up') else EF/3 if only.endswith('down') else 0
        nb=(W['eg'].held.nbytes*2 if only.endswith('up') else W['ed5'].held.nbytes if only.endswith('down') else 4*n*d*8)
        tot+=timed(only,lambda:gemm.experts(ops,x,ch,W['eg'],W['eu'],W['ed5'],res,True),fl,nb)
    ops.run=run; gemm.sort=orig
    timed('experts all, down Q5_0',lambda:gemm.experts(ops,x,ch,W['eg'],W['eu'],W['ed5'],res,True),EF)
    timed('experts all, down Q8_0',lambda:gemm.experts(ops,x,ch,W['eg'],W['eu'],W['ed8'],res,True),EF)
    tot+=timed('scores',lambda:gemm.route_scores(ops,xf,gate),F(64,d))
    tot+=2*timed('norm16 keep',lambda:gemm.norm16(ops,xf,nw,1e-6,keep=True))
    timed('to16',lambda:gemm.to16(ops,xf))
    print('sum of a layer', round(tot,1),'us')
