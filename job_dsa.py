import sys, time, traceback
sys.path.insert(0,'tests')
import numpy as np
from kit.simt_device import Launcher
from kit.sparse_cases import SparseCase, device_step, host_step
from kit import sampling_cases as sc
from mlacli.backends.cuda_device import CudaDevice
ops=Launcher(CudaDevice("cuda0", 3<<30))
print('sm',ops.n_sm,ops.capability)
def attempt(name,f):
    m=ops.device.mark(); t=time.time()
    try: r=f()
    except BaseException as e:
        r='FAIL '+' | '.join(traceback.format_exc().splitlines()[-3:])[:400]
    print(name,'->',r,f'{time.time()-t:.1f}s',flush=True); ops.device.rewind(m)
cases=[dict(n=1,n_kv=300,top_k=40),dict(n=1,n_kv=2049),dict(n=1,n_kv=16384),dict(n=1,n_kv=131072),dict(n=3,n_kv=131072,padded=1),
 dict(n=2,n_kv=16384),dict(n=512,n_kv=512,compared=20),dict(n=512,n_kv=2049,compared=20),dict(n=512,n_kv=16384,compared=20),dict(n=200,n_kv=131072,compared=3),
 dict(n=1,n_kv=140000,levels=3),dict(n=1,n_kv=400000,levels=3),dict(n=40,n_kv=5000,padded=3,compared=9)]
for t in ('f32','bf16','q8_0'): cases+=[dict(n=1,n_kv=5000,cache_type=t),dict(n=40,n_kv=5000,cache_type=t,padded=3,compared=9)]
for h,w,p in ((64,128,64),(8,64,32),(5,36,16)): cases+=[dict(n=n,n_kv=3001,heads=h,width=w,p=p,top_k=100,compared=9) for n in (1,33)]
for c in cases: attempt(c,lambda: SparseCase(3,**c).check(ops))
for V in (300,32003,102400,154880,200001): attempt(f'sample {V}',lambda: sc.check(ops,V,("","flat","ties","equal","peak"),3))
attempt('banned',lambda: sc.check_banned(ops,102400)); attempt('finite',lambda: sc.check_not_finite(ops,102400))
